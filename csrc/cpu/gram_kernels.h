// The kernels of gram.h, compiled once per instruction set.
#pragma once

#include "gram.h"
#include "product_kernels.h"

namespace dp2vae::DP2VAE_ISA {

// Channels of one record of an operand, on the pixels start + i * hop of each axis, to rows of numbers.
template <class T>
void gather(const Operand& o, const GramPlan& plan, int64_t n, int64_t first, int64_t channels,
            const int64_t* size, const int64_t* start, const int64_t* hop, float* to) {
  const T* data = static_cast<const T*>(o.data) + n * o.record + first * o.channel;
  for (int d = 0; d < 3; ++d) data += start[d] * o.axis[d];
  const bool one_row =
      size[0] == 1 && plan.row[0] == size[2] && hop[1] * o.axis[1] == size[2] * hop[2] * o.axis[2];
  if (one_row) {
    turn_block(data, o.channel, hop[2] * o.axis[2], channels, size[1] * size[2], to, plan.step, plan.step,
               to + channels * plan.step);
    return;
  }
  for (int64_t z = 0; z < size[0]; ++z)
    for (int64_t y = 0; y < size[1]; ++y) {
      const T* from = data + z * hop[0] * o.axis[0] + y * hop[1] * o.axis[1];
      const int64_t first = z * plan.row[1] + y * plan.row[0];
      turn_block(from, o.channel, hop[2] * o.axis[2], channels, size[2], to + first, plan.step,
                 plan.step - first, to + channels * plan.step);
    }
}

void gather(const Operand& o, const GramPlan& plan, int64_t n, int64_t first, int64_t channels,
            const int64_t* size, const int64_t* start, const int64_t* hop, float* to) {
  o.bf16 ? gather<uint16_t>(o, plan, n, first, channels, size, start, hop, to)
         : gather<float>(o, plan, n, first, channels, size, start, hop, to);
}

#if DP2VAE_LANES == 16
// Sixteen numbers of every channel, of pixels that lie at `source` within 64 floats: out of four vectors, of
// which nothing behind the last pixel is read.
DP2VAE_INLINE void look_up_near(const float* from, int64_t from_step, const int32_t* source, int64_t count,
                                int64_t first, int64_t last, int64_t channels, float* to, int64_t to_step) {
  alignas(64) int32_t near[16] = {};
  for (int64_t i = 0; i < count; ++i) near[i] = static_cast<int32_t>(source[i] - first);
  const __m512i index = _mm512_load_si512(near);
  const __mmask16 valid = static_cast<__mmask16>((1 << count) - 1);
  const __mmask16 high = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(32));
  const uint64_t readable = ~uint64_t{0} >> (63 - (last - first));
  const auto part = [&](const float* channel, int v) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(readable >> (16 * v)), channel + 16 * v);
  };
  for (int64_t c = 0; c < channels; ++c, to += to_step) {
    const float* channel = from + c * from_step + first;
    __m512 found = _mm512_permutex2var_ps(part(channel, 0), index, part(channel, 1));
    if (last - first >= 32)
      found = _mm512_mask_blend_ps(high, found,
                                   _mm512_permutex2var_ps(part(channel, 2), index, part(channel, 3)));
    store(to, (F)_mm512_maskz_mov_ps(valid, found));
  }
}
#endif

// The pixels of a phase, of every channel; the rest of the vectors that hold numbers is set to zero.
DP2VAE_INLINE void look_up(const float* from, int64_t from_step, const GramPhase& phase, int64_t channels,
                           float* to, const GramPlan& plan) {
  const int64_t count = phase.size[0] * phase.size[1] * phase.size[2], to_step = plan.step;
  for (int64_t i = 0; i < plan.numbers; i += kWidth) {
    const int32_t* const source = phase.source + i;
    const int64_t here = count - i < kWidth ? count - i : kWidth;
#if DP2VAE_LANES == 16
    if (here > 0) {
      int32_t first = source[0], last = source[0];
      for (int64_t j = 1; j < here; ++j) {
        first = source[j] < first ? source[j] : first;
        last = source[j] > last ? source[j] : last;
      }
      if (last - first < 64) {
        look_up_near(from, from_step, source, here, first, last, channels, to + i, to_step);
        continue;
      }
    }
#endif
    for (int64_t c = 0; c < channels; ++c) {
      float* out = to + c * to_step + i;
      for (int64_t j = 0; j < here; ++j) out[j] = from[c * from_step + source[j]];
      for (int64_t j = here > 0 ? here : 0; j < kWidth; ++j) out[j] = 0;
    }
  }
}

// Numbers that fill vectors, or nearly: the rest, if any, are rows only.
DP2VAE_INLINE int64_t body_of(const GramPlan& plan) {
  const int64_t rest = plan.numbers % kWidth;
  return rest <= kWidth / 4 ? plan.numbers - rest : plan.numbers;
}

// Rows `row` of the Gram matrix of an operand, in whole vectors that cover the columns [from, end).
DP2VAE_INLINE void gram_rows(const GramPlan& plan, const float* operand, int64_t channels, Span row,
                             int64_t from, int64_t end, float* out) {
  const int64_t wide = row.count <= kMaxRows[4] ? 4 : 2;
  for (int64_t j = from / kWidth * kWidth; j < end;) {
    const int64_t left = (end - j + kWidth - 1) / kWidth, vectors = left < wide ? left : wide;
    kTiles[vectors][row.count](channels, operand + row.begin, plan.step, operand + j, plan.at, 1, false,
                               out + j, plan.step);
    j += vectors * kWidth;
  }
}

// The matrix but for what lies below the diagonal, of which some is made and the rest stays as it is.
void gram_matrix(const GramPlan& plan, const float* operand, int64_t channels, float* out) {
  const int64_t body = body_of(plan), tiles = (body + kMaxRows[2] - 1) / kMaxRows[2];
  for (int64_t i = 0; i < tiles; ++i) {
    const Span row = span(body, tiles, i);
    gram_rows(plan, operand, channels, row, row.begin, body, out + row.begin * plan.step);
  }
  if (body == plan.numbers) return;
  gram_rows(plan, operand, channels, {body, plan.numbers - body}, 0, plan.numbers, out + body * plan.step);
  for (int64_t t = body; t < plan.numbers; ++t)
    for (int64_t u = 0; u < body; ++u) out[u * plan.step + t] = out[t * plan.step + u];
}

// sum of b[j] x[j] for j from `from` to the end of the vector that `end` is in, in lanes where these are
// whole.
DP2VAE_INLINE double dot(const float* b, const float* x, int64_t from, int64_t end, Wide& total) {
  double rest = 0;
  if (from >= end) return rest;
  int64_t j = from;
  for (; j < end && j % kWidth; ++j) rest += static_cast<double>(b[j]) * x[j];
  F sums[2] = {};
  for (int k = 0; j < end; j += kWidth, k ^= 1) sums[k] = fma(load(b + j), load(x + j), sums[k]);
  add(total, sums[0]);
  add(total, sums[1]);
  return rest;
}

// The squared norm of a group of one record whose positions are its pixels: strips of both matrices are
// multiplied as they come.
void strips(const Product& p, const GramPlan& plan, const GramScratch& s, GramNorm& norm, double& reach) {
  Wide twice = {};
  const int64_t body = body_of(plan), tiles = (body + kMaxRows[2] - 1) / kMaxRows[2];
  for (int64_t i = 0; i < tiles + (body < plan.numbers); ++i) {
    const bool last = i == tiles;  // the numbers that are rows only
    const Span row = last ? Span{body, plan.numbers - body} : span(body, tiles, i);
    const int64_t square = row.begin + row.count, end = last ? square : body;
    gram_rows(plan, s.plain, p.rows, row, last ? 0 : row.begin, end, s.b);
    gram_rows(plan, s.spread, p.channels, row, last ? 0 : row.begin, end, s.x);
    for (int64_t r = 0; r < row.count; ++r) {
      const float *b = s.b + r * plan.step, *x = s.x + r * plan.step;
      for (int64_t j = row.begin; j < square; ++j) norm.norm_sq += static_cast<double>(b[j]) * x[j];
      norm.norm_sq += 2 * dot(b, x, last ? 0 : square, body, twice);
      const double bt = b[row.begin + r], xt = x[row.begin + r];
      norm.plain_sq += bt;
      norm.spread_sq += xt;
      reach += bt > 0 && xt > 0 ? __builtin_sqrt(bt * xt) : 0;
    }
  }
  norm.norm_sq += 2 * sum(twice);
}

// The pairs of number t with `vectors` vectors of others, from j on: sum over taps of X[t + offset, j +
// offset], times B[t, j].
template <int vectors>
DP2VAE_INLINE F pairs(const GramPlan& plan, const GramPhase& phase, const GramScratch& s, int64_t t,
                      int64_t j, F onto) {
  F sums[vectors] = {};
  const int32_t* const end = phase.active + phase.active_begin[t + 1];
  for (const int32_t* k = phase.active + phase.active_begin[t]; k < end; ++k) {
    const GramTap& tap = phase.taps[*k];
    const float* x = s.x + (t + tap.offset) * plan.step + tap.offset + j;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sums[v] = fma(load(tap.mask + j + v * kWidth), load(x + v * kWidth), sums[v]);
  }
  const float* b = s.b + t * plan.step + j;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) onto = fma(load(b + v * kWidth), sums[v], onto);
  return onto;
}

// Adds sum over taps of this phase of B[t, t'] X[t + offset, t' + offset] to the norm, row t by row t, for
// every pair of t and another number: twice for those above the diagonal, the part below it being zero in B.
void combine(const GramPlan& plan, const GramPhase& phase, const GramScratch& s, GramNorm& norm) {
  Wide total = {};
  for (int64_t t = 0; t < plan.numbers; ++t) {
    F row = {};
    int64_t j = t / kWidth * kWidth;
    for (; j + 3 * kWidth < plan.numbers; j += 4 * kWidth) row = pairs<4>(plan, phase, s, t, j, row);
    switch ((plan.numbers - j + kWidth - 1) / kWidth) {
      case 3:
        row = pairs<3>(plan, phase, s, t, j, row);
        break;
      case 2:
        row = pairs<2>(plan, phase, s, t, j, row);
        break;
      case 1:
        row = pairs<1>(plan, phase, s, t, j, row);
    }
    add(total, row);
  }
  norm.norm_sq += 2 * sum(total);
}

// Adds the squares of the pixels that each position's taps read in this phase.
void add_windows(const GramPlan& plan, const GramPhase& phase, const GramScratch& s) {
  for (int64_t t = 0; t < plan.numbers; ++t) s.pixels[t] = s.x[t * plan.step + t];
  for (int64_t k = 0; k < phase.tap_count; ++k) {
    const float *pixels = s.pixels + phase.taps[k].offset, *mask = phase.taps[k].mask;
    for (int64_t t = 0; t < plan.numbers; ++t) s.windows[t] += static_cast<double>(mask[t] * pixels[t]);
  }
}

// Takes the diagonal out of B, and what there is below it.
void take_diagonal(const GramPlan& plan, const GramScratch& s) {
  for (int64_t t = 0; t < plan.numbers; ++t) {
    float* row = s.b + t * plan.step;
    s.positions[t] = row[t];
    for (int64_t j = t / kWidth * kWidth; j <= t; ++j) row[j] = 0;
  }
}

GramNorm gram(const Product& p, const GramPlan& plan, int64_t n, const GramScratch& s) {
  GramNorm norm{};
  const int64_t origin[3] = {0, 0, 0}, one[3] = {1, 1, 1};
  for (int64_t g = 0; g < p.groups; ++g) {
    double reach = 0;
    gather(p.plain, plan, n, g * p.rows, p.rows, p.grid, origin, one, s.plain);
    if (plan.one_to_one) {
      gather(p.spread, plan, n, g * p.channels, p.channels, p.grid, origin, p.stride, s.spread);
      strips(p, plan, s, norm, reach);
    } else {
      gram_matrix(plan, s.plain, p.rows, s.b);
      take_diagonal(plan, s);
      for (int64_t t = 0; t < plan.numbers; ++t) s.windows[t] = 0;
      for (int64_t f = 0; f < plan.phase_count; ++f) {
        const GramPhase& phase = plan.phases[f];
        if (phase.source && !p.spread.bf16) {
          const auto* data = static_cast<const float*>(p.spread.data) + n * p.spread.record;
          look_up(data + g * p.channels * p.spread.channel, p.spread.channel, phase, p.channels, s.spread,
                  plan);
        } else {
          memset(s.spread, 0, sizeof(float) * plan.operand_floats(p.channels));
          gather(p.spread, plan, n, g * p.channels, p.channels, phase.size, phase.start, p.stride, s.spread);
        }
        gram_matrix(plan, s.spread, p.channels, s.x);
        add_windows(plan, phase, s);
        combine(plan, phase, s, norm);
      }
      for (int64_t t = 0; t < plan.numbers; ++t) {
        const double bt = s.positions[t], xt = s.windows[t];
        norm.norm_sq += bt * xt;
        norm.plain_sq += bt;
        norm.spread_sq += xt;
        reach += bt > 0 && xt > 0 ? __builtin_sqrt(bt * xt) : 0;
      }
    }
    norm.reach += reach * reach;
  }
  return norm;
}

extern const GramKernels gram_kernels = {kWidth, gram};

}  // namespace dp2vae::DP2VAE_ISA
