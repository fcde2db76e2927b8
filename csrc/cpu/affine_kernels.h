// The kernels of affine.h, compiled once per instruction set.
#pragma once

#include "affine.h"
#include "tile.h"

namespace dp2vae::DP2VAE_ISA {

constexpr int64_t kSumRun =
    32 * kWidth;  // terms that are added up in float32 before they go to a double, per lane 32

// The sum of a contiguous row.
DP2VAE_INLINE double row_sum(const float* x, int64_t n) {
  Wide total = {};
  int64_t i = 0;
  while (i + kWidth <= n) {
    F lanes = {};
    const int64_t end = n - i < kSumRun ? n : i + kSumRun;
    for (; i + kWidth <= end; i += kWidth) lanes += load(x + i);
    add(total, lanes);
  }
  double out = sum(total);
  for (; i < n; ++i) out += x[i];
  return out;
}

// Sums of x, x^2, b and x b along a contiguous row, `shift` taken from every x first.
DP2VAE_INLINE void row_sums(const float* x, const float* b, int64_t n, float shift, double* sums) {
  Wide totals[4] = {};
  const F shifts = all(shift);
  int64_t i = 0;
  while (i + kWidth <= n) {
    F lanes[4] = {};
    const int64_t end = n - i < kSumRun ? n : i + kSumRun;
    for (; i + kWidth <= end; i += kWidth) {
      const F u = load(x + i) - shifts, v = load(b + i);
      lanes[0] += u;
      lanes[1] = fma(u, u, lanes[1]);
      lanes[2] += v;
      lanes[3] = fma(u, v, lanes[3]);
    }
    for (int k = 0; k < 4; ++k) add(totals[k], lanes[k]);
  }
  for (int k = 0; k < 4; ++k) sums[k] = sum(totals[k]);
  for (; i < n; ++i) {
    const double u = static_cast<double>(x[i]) - shift, v = b[i];
    sums[0] += u;
    sums[1] += u * u;
    sums[2] += v;
    sums[3] += u * v;
  }
}

// The same for every one of `kWidth` channels that lie side by side, each with a shift of its own.
DP2VAE_INLINE void lane_sums(const float* x, const float* b, int64_t n, int64_t x_step, int64_t b_step,
                             const float* shift, double* sums) {
  Wide totals[4] = {};
  const F shifts = load(shift);
  for (int64_t begin = 0; begin < n; begin += 32) {
    const int64_t end = n - begin < 32 ? n : begin + 32;
    F lanes[4] = {};
    for (int64_t s = begin; s < end; ++s) {
      const F u = load(x + s * x_step) - shifts, v = load(b + s * b_step);
      lanes[0] += u;
      lanes[1] = fma(u, u, lanes[1]);
      lanes[2] += v;
      lanes[3] = fma(u, v, lanes[3]);
    }
    for (int k = 0; k < 4; ++k) add(totals[k], lanes[k]);
  }
  for (int c = 0; c < kWidth; ++c)
    for (int k = 0; k < 4; ++k) sums[4 * c + k] = totals[k][c];
}

// The sum over sites of every channel, to sums[4 * channel].
DP2VAE_INLINE void channel_sums(const float* x, int64_t channels, int64_t sites, const int64_t* strides,
                                double* sums) {
  int64_t c = 0;
  for (; strides[0] == 1 && c + kWidth <= channels; c += kWidth) {
    Wide total = {};
    for (int64_t s = 0; s < sites; ++s) add(total, load(x + c + s * strides[1]));
    for (int i = 0; i < kWidth; ++i) sums[4 * (c + i)] = total[i];
  }
  for (; c < channels; ++c) {
    const float* const row = x + c * strides[0];
    double total = 0;
    if (strides[1] == 1)
      total = row_sum(row, sites);
    else
      for (int64_t s = 0; s < sites; ++s) total += row[s * strides[1]];
    sums[4 * c] = total;
  }
}

// Moments are taken about a mean that was found before: about zero, those of a large mean would cancel.
void group_norm(const float* x, const float* b, int64_t channels, int64_t sites, const int64_t* x_strides,
                const int64_t* b_strides, int64_t groups, double eps, double* sums, float* weight,
                float* bias) {
  const int64_t size = channels / groups;
  channel_sums(x, channels, sites, x_strides, sums);
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) mean += sums[4 * i];
    for (int64_t i = g * size; i < (g + 1) * size; ++i) weight[i] = static_cast<float>(mean / (size * sites));
  }
  const float* const shift = weight;  // until it is replaced
  int64_t c = 0;
  if (x_strides[0] == 1 && b_strides[0] == 1)
    for (; c + kWidth <= channels; c += kWidth)
      lane_sums(x + c, b + c, sites, x_strides[1], b_strides[1], shift + c, sums + 4 * c);
  for (; c < channels; ++c) {
    if (x_strides[1] == 1 && b_strides[1] == 1) {
      row_sums(x + c * x_strides[0], b + c * b_strides[0], sites, shift[c], sums + 4 * c);
      continue;
    }
    double* const to = sums + 4 * c;
    to[0] = to[1] = to[2] = to[3] = 0;
    for (int64_t s = 0; s < sites; ++s) {
      const double u = static_cast<double>(x[c * x_strides[0] + s * x_strides[1]]) - shift[c];
      const double v = b[c * b_strides[0] + s * b_strides[1]];
      to[0] += u;
      to[1] += u * u;
      to[2] += v;
      to[3] += u * v;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, square = 0;  // of what is left
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      mean += sums[4 * i];
      square += sums[4 * i + 1];
    }
    mean /= size * sites;
    const double variance = square / (size * sites) - mean * mean;
    const double scale = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps);
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      weight[i] = static_cast<float>((sums[4 * i + 3] - mean * sums[4 * i + 2]) * scale);
      bias[i] = static_cast<float>(sums[4 * i + 2]);
    }
  }
}

void layer_norm(const float* x, const float* b, int64_t rows, int64_t features, int64_t x_row, int64_t b_row,
                bool rms, double eps, float* weight, float* bias) {
  for (int64_t f = 0; f < features; ++f) weight[f] = bias[f] = 0;
  for (int64_t r = 0; r < rows; ++r, x += x_row, b += b_row) {
    double sums[4];
    const float shift = rms ? 0 : static_cast<float>(row_sum(x, features) / features);
    row_sums(x, x, features, shift, sums);
    const double left = rms ? 0 : sums[0] / features;
    const double variance = sums[1] / features - left * left;
    const float scale = static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps));
    const float rest = static_cast<float>(left);
    for (int64_t f = 0; f < features; ++f) {
      weight[f] += (x[f] - shift - rest) * scale * b[f];
      bias[f] += b[f];
    }
  }
}

extern const AffineKernels affine_kernels = {group_norm, layer_norm};

}  // namespace dp2vae::DP2VAE_ISA
