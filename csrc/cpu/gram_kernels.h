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

// The pixels of a phase, channel by channel; the rest of each row is set to zero.
DP2VAE_INLINE void look_up(const float* from, int64_t from_step, const GramPhase& phase, int64_t channels,
                           float* to, int64_t to_step) {
  const int64_t count = phase.size[0] * phase.size[1] * phase.size[2];
  const int32_t* const source = phase.source;
  for (int64_t c = 0; c < channels; ++c, from += from_step, to += to_step) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[source[i]];
    for (int64_t i = count; i < to_step; ++i) to[i] = 0;
  }
}

// Rows `row` of the Gram matrix of an operand, from column `from` on (rounded down to a vector).
DP2VAE_INLINE void gram_rows(const GramPlan& plan, const float* operand, int64_t channels, Span row,
                             int64_t from, float* out) {
  const int64_t end = (plan.numbers + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = from / kWidth * kWidth; j < end;) {
    const int64_t vectors = end - j >= 2 * kWidth ? 2 : 1;
    kTiles[vectors][row.count](channels, operand + row.begin, plan.step, operand + j, plan.at, 1, false,
                               out + j, plan.step);
    j += vectors * kWidth;
  }
}

// The matrix but for what lies more than kHalf below the diagonal, which stays as it is.
void gram_matrix(const GramPlan& plan, const float* operand, int64_t channels, float* out) {
  const int64_t tiles = (plan.numbers + kMaxRows[2] - 1) / kMaxRows[2];
  for (int64_t i = 0; i < tiles; ++i) {
    const Span row = span(plan.numbers, tiles, i);
    const int64_t from = row.begin < kHalf ? 0 : row.begin - kHalf + 1;
    gram_rows(plan, operand, channels, row, from, out + row.begin * plan.step);
  }
}

// The squared norm of a group of one record whose positions are its pixels: strips of both matrices are
// multiplied as they come.
void strips(const Product& p, const GramPlan& plan, const GramScratch& s, GramNorm& norm, double& reach) {
  Wide total = {};
  const int64_t tiles = (plan.numbers + kMaxRows[2] - 1) / kMaxRows[2];
  for (int64_t i = 0; i < tiles; ++i) {
    const Span row = span(plan.numbers, tiles, i);
    const int64_t from = row.begin / kWidth * kWidth, square = row.begin + row.count;
    gram_rows(plan, s.plain, p.rows, row, from, s.b);
    gram_rows(plan, s.spread, p.channels, row, from, s.x);
    for (int64_t r = 0; r < row.count; ++r) {
      const float *b = s.b + r * plan.step, *x = s.x + r * plan.step;
      double within = 0;
      int64_t j = row.begin;
      for (; j < square; ++j) within += static_cast<double>(b[j]) * x[j];
      for (; j < plan.numbers && j % kWidth; ++j) within += 2.0 * b[j] * x[j];
      F sums[2] = {};
      for (int k = 0; j < plan.numbers; j += kWidth, k ^= 1) sums[k] = fma(load(b + j), load(x + j), sums[k]);
      norm.norm_sq += within;
      add(total, sums[0]);
      add(total, sums[1]);
      const double bt = b[row.begin + r], xt = x[row.begin + r];
      norm.plain_sq += bt;
      norm.spread_sq += xt;
      reach += bt > 0 && xt > 0 ? __builtin_sqrt(bt * xt) : 0;
    }
  }
  norm.norm_sq += 2 * sum(total);
}

// Adds sum over taps of this phase of B[t, t'] X[t + offset, t' + offset] to the norm, row t by row t.
void combine(const GramPlan& plan, const GramPhase& phase, const GramScratch& s, GramNorm& norm) {
  Wide total = {};
  for (int64_t t = 0; t < plan.numbers; ++t) {
    const int64_t begin = t / kHalf * kHalf;
    F sums[2] = {};
    for (int64_t k = 0; k < phase.tap_count; ++k) {
      const GramTap& tap = phase.taps[k];
      if (tap.mask[t] == 0) continue;
      const float* b = s.b + t * plan.step;
      const float* x = s.x + (t + tap.offset) * plan.step + tap.offset;
      int64_t j = begin > tap.first ? begin : tap.first / kWidth * kWidth;
      for (; j < tap.end; j += 2 * kWidth) {
        sums[0] = fma(load(b + j) * load(tap.mask + j), load(x + j), sums[0]);
        if (j + kWidth < tap.end)
          sums[1] = fma(load(b + j + kWidth) * load(tap.mask + j + kWidth), load(x + j + kWidth), sums[1]);
      }
      s.diagonal[t] += x[t];
    }
    add(total, sums[0]);
    add(total, sums[1]);
  }
  norm.norm_sq += sum(total);
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
      float* const b = s.b;
      gram_matrix(plan, s.plain, p.rows, b);
      for (int64_t t = 0; t < plan.numbers; ++t) {
        float* row = b + t * plan.step;
        for (int64_t j = t / kHalf * kHalf + kHalf; j < plan.step; ++j) row[j] *= 2;
        s.diagonal[t] = 0;
      }
      for (int64_t f = 0; f < plan.phase_count; ++f) {
        const GramPhase& phase = plan.phases[f];
        if (phase.source && !p.spread.bf16) {
          const auto* data = static_cast<const float*>(p.spread.data) + n * p.spread.record;
          look_up(data + g * p.channels * p.spread.channel, p.spread.channel, phase, p.channels, s.spread,
                  plan.step);
        } else {
          memset(s.spread, 0, sizeof(float) * plan.operand_floats(p.channels));
          gather(p.spread, plan, n, g * p.channels, p.channels, phase.size, phase.start, p.stride, s.spread);
        }
        gram_matrix(plan, s.spread, p.channels, s.x);
        combine(plan, phase, s, norm);
      }
      for (int64_t t = 0; t < plan.numbers; ++t) {
        const double bt = b[t * plan.step + t], xt = s.diagonal[t];
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
