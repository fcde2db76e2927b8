// The inner loop of every matrix product here: a tile of a few rows by one to four vectors that stays in
// registers while the terms of one sum pass.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace dp2vae::DP2VAE_ISA {

using F = Lanes::F;
typedef float AnyF __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

typedef uint16_t AnyBF16 __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

DP2VAE_INLINE F load(const float* from) { return *reinterpret_cast<const AnyF*>(from); }
DP2VAE_INLINE F load(const uint16_t* from) {  // bfloat16
  return (F)(__builtin_convertvector(*reinterpret_cast<const AnyBF16*>(from), Lanes::U) << 16);
}
DP2VAE_INLINE void store(float* to, F x) { *reinterpret_cast<AnyF*>(to) = x; }

DP2VAE_INLINE F all(float x) {
#if DP2VAE_LANES == 16
  return (F)_mm512_set1_ps(x);
#elif DP2VAE_LANES == 8
  return (F)_mm256_set1_ps(x);
#else
  return F{x, x, x, x};
#endif
}

// a * b + c, in one rounding where the instruction set has it.
DP2VAE_INLINE F fma(F a, F b, F c) {
#if DP2VAE_LANES == 16
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DP2VAE_LANES == 8
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Rows and columns of a block change places: in every step those of numbers that differ in one bit.
template <int step>
DP2VAE_INLINE void swap_bit(F* rows) {
  Lanes::I low, high;
  for (int c = 0; c < kWidth; ++c) {
    low[c] = c & step ? kWidth + (c ^ step) : c;
    high[c] = c & step ? kWidth + c : c ^ step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if ((i & step) == 0) {
      const F a = rows[i], b = rows[i | step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | step] = __builtin_shuffle(a, b, high);
    }
}

DP2VAE_INLINE void transpose(F* rows) {
  swap_bit<1>(rows);
  swap_bit<2>(rows);
#if DP2VAE_LANES >= 8
  swap_bit<4>(rows);
#endif
#if DP2VAE_LANES >= 16
  swap_bit<8>(rows);
#endif
}

// Lanes in double, for sums of many float32 sums.
typedef double Wide __attribute__((vector_size(8 * kWidth)));

DP2VAE_INLINE void add(Wide& total, F x) { total += __builtin_convertvector(x, Wide); }

DP2VAE_INLINE double sum(const Wide& x) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

// Of a tile of 1 to 4 vectors: as many rows as fill the registers.
#if DP2VAE_LANES == 16
constexpr int kMaxRows[] = {0, 14, 14, 9, 6};
#else
constexpr int kMaxRows[] = {0, 6, 6, 4, 2};
#endif

// out[i][j] = factor * sum over k < length of left[k * left_step + i] * right[at[k] + j], onto what is there
// where `add`, for `rows` rows i and `vectors` vectors of columns j.
template <int rows, int vectors>
void tile(int64_t length, const float* left, int64_t left_step, const float* right, const int32_t* at,
          float factor, bool add, float* out, int64_t out_step) {
  F sums[rows][vectors] = {};
  for (int64_t k = 0; k < length; ++k, left += left_step) {
    const float* from = right + at[k];
    F column[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) column[j] = load(from + j * kWidth);
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const F row = all(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = fma(row, column[j], sums[i][j]);
    }
  }
  const F scale = all(factor);
  if (add) {
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* to = out + i * out_step + j * kWidth;
        store(to, fma(scale, sums[i][j], load(to)));
      }
  } else {
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) store(out + i * out_step + j * kWidth, scale * sums[i][j]);
  }
}

using Tile = void (*)(int64_t, const float*, int64_t, const float*, const int32_t*, float, bool, float*,
                      int64_t);

template <int rows, int vectors>
constexpr Tile tile_of() {
  if constexpr (rows >= 1 && rows <= kMaxRows[vectors])
    return tile<rows, vectors>;
  else
    return nullptr;
}

#define DP2VAE_TILES(v)                                                                     \
  {nullptr,          tile_of<1, v>(),  tile_of<2, v>(),  tile_of<3, v>(),  tile_of<4, v>(), \
   tile_of<5, v>(),  tile_of<6, v>(),  tile_of<7, v>(),  tile_of<8, v>(),  tile_of<9, v>(), \
   tile_of<10, v>(), tile_of<11, v>(), tile_of<12, v>(), tile_of<13, v>(), tile_of<14, v>()}
// kTiles[vectors][rows]
constexpr Tile kTiles[][15] = {{}, DP2VAE_TILES(1), DP2VAE_TILES(2), DP2VAE_TILES(3), DP2VAE_TILES(4)};
#undef DP2VAE_TILES

}  // namespace dp2vae::DP2VAE_ISA
