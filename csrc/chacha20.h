// ChaCha20 (RFC 8439) and Box-Muller, written once for scalars, SIMD lanes and GPU threads.
//
// A lane type L supplies L::U, L::I, L::F (unsigned, signed and floating 32-bit lanes) and the few operations
// that have no operator. Nothing here may be contracted to fused multiply-adds: compile with
// -ffp-contract=off (nvcc -fmad=false), and every lane type gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace dp2vae::DP2VAE_ISA {

// One value at a time.
struct Scalar {
  using U = uint32_t;
  using I = int32_t;
  using F = float;
  static DP2VAE_INLINE F to_float(I x) { return static_cast<float>(x); }
  static DP2VAE_INLINE F sqrt(F x) { return root(x); }
  static DP2VAE_INLINE I bits(F x) {
    I out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
  static DP2VAE_INLINE F from_bits(I x) {
    F out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
  template <int k>
  static DP2VAE_INLINE U rotate_left(U x) {
    return x << k | x >> (32 - k);
  }
};

template <class L>
DP2VAE_INLINE void quarter_round(typename L::U& a, typename L::U& b, typename L::U& c, typename L::U& d) {
  a += b;
  d = L::template rotate_left<16>(d ^ a);
  c += d;
  b = L::template rotate_left<12>(b ^ c);
  a += b;
  d = L::template rotate_left<8>(d ^ a);
  c += d;
  b = L::template rotate_left<7>(b ^ c);
}

// The block function: x[w] becomes word w of the block whose number stands in `counter`, lane by lane.
template <class L>
DP2VAE_INLINE void chacha20_block(const uint32_t* key, typename L::U counter, const uint32_t* nonce,
                                  typename L::U* x) {
  const typename L::U zero = counter ^ counter;
  x[0] = zero + 0x61707865u;
  x[1] = zero + 0x3320646eu;
  x[2] = zero + 0x79622d32u;
  x[3] = zero + 0x6b206574u;
  for (int i = 0; i < 8; ++i) x[4 + i] = zero + key[i];
  x[12] = counter;
  for (int i = 0; i < 3; ++i) x[13 + i] = zero + nonce[i];
  for (int i = 0; i < 10; ++i) {
    quarter_round<L>(x[0], x[4], x[8], x[12]);
    quarter_round<L>(x[1], x[5], x[9], x[13]);
    quarter_round<L>(x[2], x[6], x[10], x[14]);
    quarter_round<L>(x[3], x[7], x[11], x[15]);
    quarter_round<L>(x[0], x[5], x[10], x[15]);
    quarter_round<L>(x[1], x[6], x[11], x[12]);
    quarter_round<L>(x[2], x[7], x[8], x[13]);
    quarter_round<L>(x[3], x[4], x[9], x[14]);
  }
  x[0] += 0x61707865u;
  x[1] += 0x3320646eu;
  x[2] += 0x79622d32u;
  x[3] += 0x6b206574u;
  for (int i = 0; i < 8; ++i) x[4 + i] += key[i];
  x[12] += counter;
  for (int i = 0; i < 3; ++i) x[13 + i] += nonce[i];
}

// ln(1 + f) + e ln 2 for 1 + f in [sqrt(1/2), sqrt(2)): minimax P in f - f^2/2 + f^3 P(f), relative error
// 6e-9.
template <class L>
DP2VAE_INLINE typename L::F log_of_parts(typename L::F f, typename L::F e) {
  typename L::F p = f * -7.634774674570084e-2f + 1.276170313358307e-1f;
  p = p * f - 1.3160136342048645e-1f;
  p = p * f + 1.4201734960079193e-1f;
  p = p * f - 1.662335991859436e-1f;
  p = p * f + 2.0001228153705597e-1f;
  p = p * f - 2.500081956386566e-1f;
  p = p * f + 3.333333134651184e-1f;
  const typename L::F square = f * f;
  const typename L::F small = p * f * square - square * 0.5f + e * -2.12194440e-4f;
  return f + small + e * 0.693359375f;  // ln 2 in two parts: the first times e is exact
}

// Splits x > 0 into m 2^e with m in [sqrt(1/2), sqrt(2)) and returns m.
template <class L>
DP2VAE_INLINE typename L::F split(typename L::F x, typename L::F& e) {
  const typename L::I offset = L::bits(x) - 0x3f3504f3;  // the bits of sqrt(1/2)
  e = L::to_float(offset >> 23);
  return L::from_bits((offset & 0x007fffff) + 0x3f3504f3);
}

// sqrt(-2 ln u) for u = (a + 1/2) / 2^32. Near u = 1 the logarithm is taken of 1 - u, which is known exactly.
template <class L>
DP2VAE_INLINE typename L::F radius(typename L::U a) {
  using I = typename L::I;
  using F = typename L::F;
  const I upper = (I)a >> 31;                                 // all ones where u >= 1/2
  const F y = (L::to_float((I)a ^ upper) + 0.5f) * 0x1p-32f;  // min(u, 1 - u)
  const F x = upper != 0 ? 1.0f - y : y;
  F e;
  const F m = split<L>(x, e);
  const F f = upper == 0 ? m - 1.0f : (e == 0.0f ? -y : 1.0f - (y + y));
  return L::sqrt(log_of_parts<L>(f, e) * -2.0f);
}

// The same for the 2^-16 of all words with a < 2^16: u = (2^32 a + tail + 1/2) / 2^64.
DP2VAE_INLINE float tail_radius(uint32_t a, uint32_t tail) {
  const float x = (static_cast<float>((static_cast<uint64_t>(a) << 32) | tail) + 0.5f) * 0x1p-64f;
  float e;
  const float m = split<Scalar>(x, e);
  return Scalar::sqrt(log_of_parts<Scalar>(m - 1.0f, e) * -2.0f);
}

// cos and sin of 2 pi b / 2^32. The nearest quarter turn is cut off in integers; t is what remains, in
// quarter turns.
template <class L>
DP2VAE_INLINE void direction(typename L::U b, typename L::F& cosine, typename L::F& sine) {
  using I = typename L::I;
  using F = typename L::F;
  const typename L::U quarter = (b + 0x20000000u) >> 30;
  const F t = L::to_float((I)(b << 2)) * 0x1p-32f;
  const F s = t * t;
  const F q = (s * -4.6048532240092754e-3f + 7.968141883611679e-2f) * s - 6.459636092185974e-1f;
  const F sin_t = t * 1.5707963705062866f + t * (s * q - 4.371139e-8f);  // pi/2 in two parts
  const F r = (s * 9.03770443983376e-4f - 2.086016722023487e-2f) * s + 2.5366923213005066e-1f;
  const F cos_t = (r * s - 1.2337005138397217f) * s + 1.0f;
  const auto odd = (quarter & 1u) != 0;
  cosine = L::from_bits(L::bits(odd ? sin_t : cos_t) ^ (I)((quarter + 1u) >> 1 << 31));
  sine = L::from_bits(L::bits(odd ? cos_t : sin_t) ^ (I)(quarter >> 1 << 31));
}

// The two normals of a word triple whose radius word is below 2^16.
DP2VAE_INLINE void box_muller_tail(uint32_t radius_word, uint32_t tail_word, uint32_t angle_word,
                                   float& first, float& second) {
  direction<Scalar>(angle_word, first, second);
  const float r = tail_radius(radius_word, tail_word);
  first *= r;
  second *= r;
}

}  // namespace dp2vae::DP2VAE_ISA
