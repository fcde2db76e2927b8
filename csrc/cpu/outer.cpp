// Sums over records of outer products, for linear layers of one position.
#include "outer.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "buffers.h"
#include "isa.h"
#include "operands.h"
#include "packing.h"

namespace dp2vae {
namespace {

// Packed at a time, so that it stays in the second cache.
constexpr int64_t kParts = 4, kColumns = 768, kRows = 256;

const OuterKernels& outer_kernels_in_use() { return DP2VAE_IN_USE(outer_kernels); }

void add_block(const Product& p, const Layout& l, OuterBlock block, float* out) {
  const OuterKernels& k = outer_kernels_in_use();
  const int64_t wide = parts_of(l.vectors, l.column_tiles) * l.lanes, high = parts_of(p.rows, l.row_tiles);
  const int64_t panels = parts_of(l.column_tiles * wide, kColumns);
  const int64_t row_tiles = std::max<int64_t>(1, kRows / high);
  const Buffer spread(parts_of(l.column_tiles, panels) * wide * block.count);
  for (int64_t panel = 0; panel < panels; ++panel) {
    block.columns = {part_begin(l.column_tiles, panels, panel),
                     part_begin(l.column_tiles, panels, panel + 1)};
    torch::stable::parallel_for(block.columns.first, block.columns.end, 8, [&](int64_t first, int64_t end) {
      k.pack_columns(p, l, block, {first, end}, spread.data());
    });
    torch::stable::parallel_for(0, l.row_tiles, 1, [&](int64_t first, int64_t end) {
      const Buffer plain(row_tiles * high * block.count), edge(row_tiles * high * wide);
      for (; first < end; first += row_tiles)
        k.add_rows(p, l, block, {first, std::min(end, first + row_tiles)}, spread.data(), plain.data(),
                   edge.data(), out);
    });
  }
}

// The sum over records that are to be added up in float32.
void sum_block(const Product& p, const Layout& l, const int64_t* records, const float* factors, int64_t count,
               float* out) {
  constexpr int64_t kTogether = kParts * kRecordsPerPart;
  const int64_t blocks = parts_of(count, kTogether);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = i * kTogether, here = std::min(count - from, kTogether);
    add_block(p, l, {records + from, factors, here, parts_of(here, kRecordsPerPart), i == 0, {}}, out);
  }
}

}  // namespace

Tensor outer_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors) {
  Product p = linear_product(activations, backprops);
  STD_TORCH_CHECK(p.positions() == 1, "expected activations [N, 1, D] and backprops [N, 1, P]");
  check_factors(factors, p.records);
  Tensor out = new_floats(factors, {p.rows, p.channels});
  const float* f = static_cast<const float*>(factors.const_data_ptr());
  std::vector<int64_t> records;
  for (int64_t n = 0; n < p.records; ++n)
    if (f[n] != 0) records.push_back(n);
  if (records.empty()) {
    torch::stable::zero_(out);
    return out;
  }
  p.grid[2] = p.size[2] = kRecordsPerPart;
  const Packing packing(p, product_kernels_in_use());
  constexpr int64_t kMost = kPartsPerBlock * kRecordsPerPart;
  const int64_t count = static_cast<int64_t>(records.size()), numbers = p.numbers();
  const auto sum = [&](int64_t from, float* to) {
    sum_block(p, packing.layout, records.data() + from, f, std::min(count - from, kMost), to);
  };
  sum(0, floats(out));
  if (count <= kMost) return out;
  const Buffer block(numbers);
  std::vector<double> wide(floats(out), floats(out) + numbers);
  for (int64_t from = kMost; from < count; from += kMost) {
    sum(from, block.data());
    for (int64_t i = 0; i < numbers; ++i) wide[i] += block.data()[i];
  }
  for (int64_t i = 0; i < numbers; ++i) floats(out)[i] = static_cast<float>(wide[i]);
  return out;
}

}  // namespace dp2vae
