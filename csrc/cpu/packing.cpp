#include "packing.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

namespace dp2vae {
namespace {

// Cycles for one position of all tiles, by what a core does in one: two vector multiply-adds, two loads.
// Loads are not quite free beside the arithmetic, least where they come from the second cache, as columns do.
double cycles(const Product& p, const ProductKernels& k, int64_t columns, int64_t wide, bool unfolded) {
  const int64_t vectors = parts_of(columns, k.lanes);
  const double column_tiles = parts_of(vectors, wide);
  const double row_tiles = parts_of(p.rows, k.max_rows[wide]);
  const double rows = p.rows / row_tiles, of_a_row = vectors / column_tiles;
  const double tile =
      std::max({rows * of_a_row / 2, (rows + of_a_row) / 2, 4.0}) + rows / 16 + 3 * of_a_row / 16;
  const double unfold = !unfolded ? 0.0 : column_tiles == 1 && p.dilation[2] == 1 ? 0.75 : 2.0;
  return tile * row_tiles * column_tiles * (unfolded ? 1 : p.taps()) + unfold * columns;
}

}  // namespace

Packing::Packing(const Product& p, const ProductKernels& k) {
  Layout& l = layout;
  double best = std::numeric_limits<double>::infinity();
  for (const bool unfolded : {false, true})
    for (int64_t wide = 1; wide <= kMaxVectors; ++wide) {
      if (unfolded && p.taps() == 1) continue;
      const int64_t columns = p.channels * (unfolded ? p.taps() : 1);
      const double cost = cycles(p, k, columns, wide, unfolded);
      if (cost >= best) continue;
      best = cost;
      l.unfolded = unfolded;
      l.columns = columns;
      l.vectors = parts_of(columns, k.lanes);
      l.column_tiles = parts_of(l.vectors, wide);
      l.row_tiles = parts_of(p.rows, k.max_rows[wide]);
    }
  l.lanes = k.lanes;
  l.taps = l.unfolded ? 1 : p.taps();
  for (int d = 0; d < 3; ++d)
    l.box[d] = l.unfolded ? p.grid[d] : p.stride[d] * (p.grid[d] - 1) + p.dilation[d] * (p.kernel[d] - 1) + 1;
  l.slots = l.box[0] * l.box[1] * l.box[2];
  const auto slot = [&](int64_t z, int64_t y, int64_t x) { return (z * l.box[1] + y) * l.box[2] + x; };
  const auto hop = [&](int d) { return l.unfolded ? 1 : p.stride[d]; };
  STD_TORCH_CHECK(l.slots * kMaxVectors * k.lanes < std::numeric_limits<int32_t>::max(), "an input of ",
                  l.slots, " positions is too large");
  for (int64_t z = 0; z < p.grid[0]; ++z)
    for (int64_t y = 0; y < p.grid[1]; ++y)
      for (int64_t x = 0; x < p.grid[2]; ++x)
        for (int v = 1; v <= kMaxVectors; ++v)
          at[v].push_back(slot(z * hop(0), y * hop(1), x * hop(2)) * v * k.lanes);
  if (l.unfolded) tap_slot.push_back(0);
  for (int64_t z = 0; !l.unfolded && z < p.kernel[0]; ++z)
    for (int64_t y = 0; y < p.kernel[1]; ++y)
      for (int64_t x = 0; x < p.kernel[2]; ++x)
        tap_slot.push_back(slot(z * p.dilation[0], y * p.dilation[1], x * p.dilation[2]));
  for (int v = 1; v <= kMaxVectors; ++v) l.at[v] = at[v].data();
  l.tap_slot = tap_slot.data();
}

}  // namespace dp2vae
