// The kernels of outer.h, compiled once per instruction set: include with DP2VAE_LANES and DP2VAE_ISA defined
// and the target pragma set.
#pragma once

#include <cstring>

#include "outer.h"
#include "product_kernels.h"

namespace dp2vae::DP2VAE_ISA {

// Numbers of a record that some tiles hold, padding included.
DP2VAE_INLINE Span rows_of(const Product& p, const Layout& l, Tiles tiles) {
  const int64_t begin = part_begin(p.rows, l.row_tiles, tiles.first);
  return {begin, part_begin(p.rows, l.row_tiles, tiles.end) - begin};
}

DP2VAE_INLINE Span columns_of(const Layout& l, Tiles tiles) {
  const int64_t begin = part_begin(l.vectors, l.column_tiles, tiles.first) * kWidth;
  return {begin, part_begin(l.vectors, l.column_tiles, tiles.end) * kWidth - begin};
}

// to[k] = factor * from[k * step] for k < count.
template <class T>
DP2VAE_INLINE void scale_run(const T* from, int64_t step, int64_t count, float factor, float* to) {
  int64_t k = 0;
  if (step == 1)
    for (; k + kWidth <= count; k += kWidth) store(to + k, all(factor) * load(from + k));
  for (; k < count; ++k) to[k] = factor * value(from, k * step);
}

// Calls pack(part, first, count) for all records of a block, a few of a part at a time.
template <class Pack>
DP2VAE_INLINE void by_records(const OuterBlock& block, const Pack& pack) {
  constexpr int64_t kTogether = 16;
  for (int64_t c = 0; c < block.parts; ++c) {
    const Span part = span(block.count, block.parts, c);
    for (int64_t first = 0; first < part.count; first += kTogether)
      pack(part, first, part.count - first < kTogether ? part.count - first : kTogether);
  }
}

template <class T>
void pack_rows(const Product& p, const Layout& l, const OuterBlock& block, Tiles rows, float* plain) {
  const Operand& o = p.plain;
  const Span packed = rows_of(p, l, rows);
  by_records(block, [&](Span part, int64_t first, int64_t count) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const Span row = span(p.rows, l.row_tiles, i);
      float* to =
          plain + part.begin * packed.count + (row.begin - packed.begin) * part.count + first * row.count;
      const int64_t* n = block.records + part.begin + first;
      for (int64_t k = 0; k < count; ++k, to += row.count) {
        const T* from = static_cast<const T*>(o.data) + n[k] * o.record + row.begin * o.channel;
        __builtin_prefetch(from + 2 * 16);  // records lie too far apart to be foreseen
        copy_block(from, 0, o.channel, 1, row.count, to, 0);
      }
    }
  });
}

template <class T>
void pack_scaled_columns(const Product& p, const Layout& l, const OuterBlock& block, Tiles columns,
                         float* spread) {
  const Operand& o = p.spread;
  const Span packed = columns_of(l, block.columns);
  by_records(block, [&](Span part, int64_t first, int64_t count) {
    for (int64_t j = columns.first; j < columns.end; ++j) {
      const Span column = columns_of(l, {j, j + 1});
      const int64_t left = p.channels - column.begin, there = left < column.count ? left : column.count;
      float* to = spread + part.begin * packed.count + (column.begin - packed.begin) * part.count +
                  first * column.count;
      const int64_t* n = block.records + part.begin + first;
      for (int64_t k = 0; k < count; ++k, to += column.count) {
        scale_run(static_cast<const T*>(o.data) + n[k] * o.record + column.begin * o.channel, o.channel,
                  there, block.factors[n[k]], to);
        for (int64_t i = there; i < column.count; ++i) to[i] = 0;
      }
    }
  });
}

void pack_columns(const Product& p, const Layout& l, const OuterBlock& block, Tiles columns, float* spread) {
  p.spread.bf16 ? pack_scaled_columns<uint16_t>(p, l, block, columns, spread)
                : pack_scaled_columns<float>(p, l, block, columns, spread);
}

void add_rows(const Product& p, const Layout& l, const OuterBlock& block, Tiles rows, const float* spread,
              float* plain, float* edge, float* out) {
  p.plain.bf16 ? pack_rows<uint16_t>(p, l, block, rows, plain) : pack_rows<float>(p, l, block, rows, plain);
  const Span all_rows = rows_of(p, l, rows), all_columns = columns_of(l, block.columns);
  for (int64_t j = block.columns.first; j < block.columns.end; ++j) {
    const Span column = columns_of(l, {j, j + 1});
    const int64_t left = p.channels - column.begin;
    float* const here = out + all_rows.begin * p.channels + column.begin;
    const bool whole = column.count <= left;
    float* const to = whole ? here : edge;
    const int64_t step = whole ? p.channels : column.count, vectors = column.count / kWidth;
    if (!whole && !block.first) copy_block(here, p.channels, 1, all_rows.count, left, edge, step);
    for (int64_t c = 0; c < block.parts; ++c) {
      const Span part = span(block.count, block.parts, c);
      const float* a = plain + part.begin * all_rows.count;
      const float* b =
          spread + part.begin * all_columns.count + (column.begin - all_columns.begin) * part.count;
      for (int64_t i = rows.first; i < rows.end; ++i) {
        const Span row = span(p.rows, l.row_tiles, i);
        kTiles[vectors][row.count](part.count, a, row.count, b, l.at[vectors], 1, c > 0 || !block.first,
                                   to + (row.begin - all_rows.begin) * step, step);
        a += row.count * part.count;
      }
    }
    if (!whole) copy_block(edge, step, 1, all_rows.count, left, here, p.channels);
  }
}

extern const OuterKernels outer_kernels = {pack_columns, add_rows};

}  // namespace dp2vae::DP2VAE_ISA
