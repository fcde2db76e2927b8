// Squared norms by Gram matrices: the plan of their numbering, and records dealt to threads.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "../ops.h"
#include "buffers.h"
#include "gram.h"
#include "isa.h"
#include "operands.h"

namespace dp2vae {
namespace {

using Triple = std::array<int64_t, 3>;

const GramKernels& gram_kernels_in_use() { return DP2VAE_IN_USE(gram_kernels); }

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// A plan and what it points to.
struct Numbering {
  GramPlan plan{};
  std::vector<int32_t> at;
  std::deque<Buffer> masks;
  std::vector<std::vector<GramTap>> taps;
  std::vector<std::vector<int32_t>> active, active_begin;
  std::vector<GramPhase> phases;
  std::vector<std::vector<int32_t>> sources;

  Numbering(const Product& p, int64_t lanes);
  Numbering(const Numbering&) = delete;

 private:
  void add_phase(const Product& p, Triple phase, const std::vector<Triple>& shifts);
  void add_active(GramPhase& phase, const std::vector<GramTap>& its);
  void add_source(const Product& p, GramPhase& phase);
};

Numbering::Numbering(const Product& p, int64_t lanes) {
  const bool no_padding = p.padding[0] == 0 && p.padding[1] == 0 && p.padding[2] == 0;
  plan.one_to_one = p.taps() == 1 && no_padding;
  // Of a phase, the shift of each of its taps: position t reads pixel t + shift.
  std::map<Triple, std::vector<Triple>> shifts;
  for (int64_t z = 0; z < p.kernel[0]; ++z)
    for (int64_t y = 0; y < p.kernel[1]; ++y)
      for (int64_t x = 0; x < p.kernel[2]; ++x) {
        const Triple tap{z, y, x};
        Triple phase, shift;
        for (int d = 0; d < 3; ++d) {
          const int64_t offset = p.dilation[d] * tap[d] - p.padding[d];
          shift[d] = floor_div(offset, p.stride[d]);
          phase[d] = offset - shift[d] * p.stride[d];
        }
        shifts[phase].push_back(shift);
      }
  Triple box{p.grid[0], p.grid[1], p.grid[2]};
  for (const auto& [phase, _] : shifts)
    for (int d = 0; d < 3 && !plan.one_to_one; ++d)
      box[d] = std::max(box[d], (p.size[d] - phase[d] + p.stride[d] - 1) / p.stride[d]);
  plan.row[0] = box[2];
  plan.row[1] = box[1] * box[2];
  plan.numbers = box[0] * box[1] * box[2];
  plan.step = ((plan.numbers + lanes - 1) / lanes | 1) * lanes;
  plan.slack = 4 * lanes;
  if (!plan.one_to_one)
    for (const auto& [phase, its] : shifts) add_phase(p, phase, its);
  int64_t farthest = 0;
  for (const auto& of_phase : taps)
    for (const GramTap& tap : of_phase) farthest = std::max(farthest, std::abs(tap.offset));
  plan.slack += (farthest + lanes - 1) / lanes * lanes;  // whole vectors, on whose boundaries rows begin
  for (size_t i = 0; i < phases.size(); ++i) {
    phases[i].taps = taps[i].data();
    phases[i].tap_count = static_cast<int64_t>(taps[i].size());
    add_active(phases[i], taps[i]);
    add_source(p, phases[i]);
  }
  plan.phases = phases.data();
  plan.phase_count = static_cast<int64_t>(phases.size());
  const int64_t deepest = std::max(p.rows, p.channels);
  STD_TORCH_CHECK(deepest * plan.step < std::numeric_limits<int32_t>::max(), deepest, " channels of ",
                  plan.numbers, " positions are too large for Gram matrices");
  for (int64_t i = 0; i < deepest; ++i) at.push_back(static_cast<int32_t>(i * plan.step));
  plan.at = at.data();
}

void Numbering::add_phase(const Product& p, Triple phase, const std::vector<Triple>& shifts) {
  GramPhase made{};
  for (int d = 0; d < 3; ++d) {
    made.start[d] = phase[d];
    made.size[d] = std::max<int64_t>(0, (p.size[d] - phase[d] + p.stride[d] - 1) / p.stride[d]);
    if (made.size[d] == 0) return;  // its taps read nothing but padding
  }
  std::vector<GramTap> of_phase;
  for (const Triple& shift : shifts) {
    Buffer& mask = masks.emplace_back(plan.step + plan.slack);
    mask.zero();
    GramTap tap{shift[0] * plan.row[1] + shift[1] * plan.row[0] + shift[2], nullptr};
    bool reads = false;
    for (int64_t z = 0; z < p.grid[0]; ++z)
      for (int64_t y = 0; y < p.grid[1]; ++y)
        for (int64_t x = 0; x < p.grid[2]; ++x) {
          const Triple pixel{z + shift[0], y + shift[1], x + shift[2]};
          bool inside = true;
          for (int d = 0; d < 3; ++d) inside = inside && 0 <= pixel[d] && pixel[d] < made.size[d];
          if (!inside) continue;
          mask.data()[z * plan.row[1] + y * plan.row[0] + x] = 1;
          reads = true;
        }
    if (!reads) {
      masks.pop_back();
      continue;
    }
    tap.mask = mask.data();
    of_phase.push_back(tap);
  }
  if (of_phase.empty()) return;
  taps.push_back(std::move(of_phase));
  phases.push_back(made);
}

void Numbering::add_active(GramPhase& phase, const std::vector<GramTap>& its) {
  std::vector<int32_t> taps_at, begin{0};
  for (int64_t t = 0; t < plan.numbers; ++t) {
    for (size_t k = 0; k < its.size(); ++k)
      if (its[k].mask[t] != 0) taps_at.push_back(static_cast<int32_t>(k));
    begin.push_back(static_cast<int32_t>(taps_at.size()));
  }
  active.push_back(std::move(taps_at));
  active_begin.push_back(std::move(begin));
  phase.active = active.back().data();
  phase.active_begin = active_begin.back().data();
}

void Numbering::add_source(const Product& p, GramPhase& phase) {
  const bool gaps =
      phase.size[2] != plan.row[0] || (phase.size[0] > 1 && phase.size[1] * phase.size[2] != plan.row[1]);
  if (gaps) return;
  std::vector<int32_t> source;
  for (int64_t z = 0; z < phase.size[0]; ++z)
    for (int64_t y = 0; y < phase.size[1]; ++y)
      for (int64_t x = 0; x < phase.size[2]; ++x) {
        const Triple at{z, y, x};
        int64_t offset = 0;
        for (int d = 0; d < 3; ++d) offset += (phase.start[d] + at[d] * p.stride[d]) * p.spread.axis[d];
        if (offset > std::numeric_limits<int32_t>::max()) return;
        source.push_back(static_cast<int32_t>(offset));
      }
  sources.push_back(std::move(source));
  phase.source = sources.back().data();
}

// Float32 roundings that a term of the squared norm passes through, at most: in channel products, in their
// sum over taps and along a row, and, doubled by the square, in the product that is formed from the same
// operands afterwards.
int64_t depth_of(const Product& p, const Numbering& numbering, int64_t lanes) {
  size_t taps = 1;
  for (const auto& of_phase : numbering.taps) taps = std::max(taps, of_phase.size());
  return p.rows + p.channels + static_cast<int64_t>(taps) + numbering.plan.numbers / lanes + 1 +
         2 * (product_depth(p.positions()) + 1) + 8;
}

std::tuple<Tensor, Tensor> gram_norms(const Product& p, const Tensor& like) {
  Tensor norm_sq = new_floats(like, {p.records}), error = new_floats(like, {p.records});
  float *norms = floats(norm_sq), *errors = floats(error);
  if (p.records == 0) return {norm_sq, error};
  const GramKernels& kernels = gram_kernels_in_use();
  const Numbering numbering(p, kernels.lanes);
  const GramPlan& plan = numbering.plan;
  const int64_t depth = depth_of(p, numbering, kernels.lanes);
  const double lost = static_cast<double>(depth) * p.positions() * p.positions() * kTiny;
  torch::stable::parallel_for(0, p.records, 1, [&](int64_t first, int64_t end) {
    Buffer plain(plan.operand_floats(p.rows)), spread(plan.operand_floats(p.channels));
    Buffer b(plan.matrix_floats()), x(plan.matrix_floats());
    for (Buffer* scratch : {&plain, &spread, &b, &x}) scratch->zero();
    std::vector<float> positions(plan.numbers), pixels(plan.numbers + 2 * plan.slack);
    std::vector<double> windows(plan.numbers);
    const GramScratch scratch{plain.data(),          spread.data(),    b.data() + plan.slack,
                              x.data() + plan.slack, positions.data(), pixels.data() + plan.slack,
                              windows.data()};
    for (int64_t n = first; n < end; ++n) {
      const GramNorm norm = kernels.gram(p, plan, n, scratch);
      // Below zero by rounding; what has overflowed stays as it is, for its error may be finite.
      const bool cancelled = norm.norm_sq < 0 && std::isfinite(norm.norm_sq);
      norms[n] = cancelled ? 0.0f : static_cast<float>(std::abs(norm.norm_sq));
      errors[n] =
          static_cast<float>(roundoff(depth) * norm.reach + lost * (norm.plain_sq + norm.spread_sq + 1));
    }
  });
  return {norm_sq, error};
}

// Of one position: the gradient is an outer product, and the squares of its factors are sums without signs.
std::tuple<Tensor, Tensor> outer_norms(const Product& p, const Tensor& like) {
  STD_TORCH_CHECK(!p.plain.bf16 && !p.spread.bf16 && p.plain.channel == 1 && p.spread.channel == 1,
                  "one position: expected float32 with features side by side");
  Tensor norm_sq = new_floats(like, {p.records}), error = new_floats(like, {p.records});
  float *norms = floats(norm_sq), *errors = floats(error);
  const auto squares = product_kernels_in_use().squares;
  const auto row = [](const Operand& o, int64_t n) {
    return static_cast<const float*>(o.data) + n * o.record;
  };
  const int64_t numbers = p.rows + p.channels;
  const double off = roundoff(2 * kSquaresDepth + 2), lost = static_cast<double>(numbers) * kTiny;
  torch::stable::parallel_for(0, p.records, 1 + 16384 / numbers, [&](int64_t first, int64_t end) {
    for (int64_t n = first; n < end; ++n) {
      const double plain_sq = squares(row(p.plain, n), p.rows);
      const double spread_sq = squares(row(p.spread, n), p.channels);
      norms[n] = static_cast<float>(plain_sq * spread_sq);
      errors[n] = static_cast<float>(off * plain_sq * spread_sq + lost * (plain_sq + spread_sq + 1));
    }
  });
  return {norm_sq, error};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_norm_sq(const Tensor& activations, const Tensor& backprops) {
  const Product p = linear_product(activations, backprops);
  return p.positions() == 1 ? outer_norms(p, activations) : gram_norms(p, activations);
}

std::tuple<Tensor, Tensor> conv_norm_sq(const Tensor& activations, const Tensor& backprops, Ints weight_shape,
                                        Ints stride, Ints padding, Ints dilation, int64_t groups,
                                        bool transposed) {
  return gram_norms(
      conv_product(activations, backprops, weight_shape, stride, padding, dilation, groups, transposed),
      activations);
}

}  // namespace dp2vae
