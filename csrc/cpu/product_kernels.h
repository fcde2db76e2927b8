// The kernels of product.h, compiled once per instruction set: include with DP2VAE_LANES and DP2VAE_ISA
// defined and the target pragma set.
#pragma once

#include <cstring>
#include <type_traits>

#include "buffers.h"
#include "product.h"
#include "tile.h"

namespace dp2vae::DP2VAE_ISA {

DP2VAE_INLINE float value(const float* data, int64_t i) { return data[i]; }

DP2VAE_INLINE float value(const uint16_t* data, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(data[i]) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// A tile's place along one side of the product.
struct Span {
  int64_t begin, count;
};

DP2VAE_INLINE Span span(int64_t n, int64_t parts, int64_t i) {
  const int64_t begin = part_begin(n, parts, i);
  return {begin, part_begin(n, parts, i + 1) - begin};
}

// to[k] = from[k] for k < count.
template <class T>
DP2VAE_INLINE void copy_run(const T* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = value(from, k);
}

// Runs are short, as wide as a tile: in few moves, not one by one.
DP2VAE_INLINE void copy_run(const float* from, int64_t count, float* to) {
  constexpr int64_t kMove = kWidth < 16 ? 8 : 16;
  int64_t k = 0;
  const auto move = [&](auto bytes) {
    memcpy(to + k, from + k, bytes());
    k += bytes() / sizeof(float);
  };
  while (k + kMove <= count) move(std::integral_constant<size_t, kMove * sizeof(float)>());
  if ((count - k) & 8) move(std::integral_constant<size_t, 32>());
  if ((count - k) & 4) move(std::integral_constant<size_t, 16>());
  if ((count - k) & 2) move(std::integral_constant<size_t, 8>());
  if ((count - k) & 1) to[k] = from[k];
}

// to[i * to_step + k] = from[i * from_step + k * from_inner] for i < count, k < inner, along whichever index
// lies closer together.
template <class T>
DP2VAE_INLINE void copy_block(const T* from, int64_t from_step, int64_t from_inner, int64_t count,
                              int64_t inner, float* to, int64_t to_step) {
  if (from_inner == 1) {
    for (int64_t i = 0; i < count; ++i) copy_run(from + i * from_step, inner, to + i * to_step);
  } else if (from_inner < from_step) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < inner; ++k) to[i * to_step + k] = value(from, i * from_step + k * from_inner);
  } else {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < count; ++i) to[i * to_step + k] = value(from, i * from_step + k * from_inner);
  }
}

// `here` vectors that lie `step` apart, zeros behind them: in registers, which a loop of unknown length is
// not.
template <class T>
DP2VAE_INLINE void load_block(const T* from, int64_t step, int64_t here, F* block) {
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; ++j) block[j] = j < here ? load(from + j * step) : F{};
}

// The same where the `count` numbers may lie together: blocks of lanes by lanes are turned in registers. What
// lies behind the `inner` numbers of a row is overwritten, by zeros up to `room` numbers from its start,
// before the next rows are, and nothing from `limit` on.
template <class T>
DP2VAE_INLINE void turn_block(const T* from, int64_t from_step, int64_t from_inner, int64_t count,
                              int64_t inner, float* to, int64_t to_step, int64_t room, const float* limit) {
  int64_t i = 0;
  if (from_step == 1 && from_inner != 1)
    for (; i + kWidth <= count; i += kWidth) {
      float* const rows = to + i * to_step;
      int64_t k = 0;
      for (; k < inner && k + kWidth <= room && rows + (kWidth - 1) * to_step + k + kWidth <= limit;
           k += kWidth) {
        const int64_t here = inner - k < kWidth ? inner - k : kWidth;
        F block[kWidth];
        load_block(from + i + k * from_inner, from_inner, here, block);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) store(rows + j * to_step + k, block[j]);
      }
      if (k < inner)
        copy_block(from + i + k * from_inner, 1, from_inner, kWidth, inner - k, rows + k, to_step);
    }
  copy_block(from + i * from_step, from_step, from_inner, count - i, inner, to + i * to_step, to_step);
}

template <class T>
void pack_plain(const Product& p, const Layout& l, int64_t n, int64_t place, int64_t block, float* packed) {
  const Operand& o = p.plain;
  const T* data = static_cast<const T*>(o.data) + n * o.record;
  const int64_t positions = p.positions();
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < l.row_tiles; ++i) {
      const Span row = span(p.rows, l.row_tiles, i);
      float* to = packed + ((g * p.rows + row.begin) * block + place * row.count) * positions;
      const float* const limit = to + positions * row.count;
      const T* from = data + (g * p.rows + row.begin) * o.channel;
      if (p.grid[0] == 1 && o.axis[1] == p.grid[2] * o.axis[2]) {  // one long row
        turn_block(from, o.axis[2], o.channel, positions, row.count, to, row.count, kWidth, limit);
        continue;
      }
      for (int64_t z = 0; z < p.grid[0]; ++z)
        for (int64_t y = 0; y < p.grid[1]; ++y) {
          turn_block(from + z * o.axis[0] + y * o.axis[1], o.axis[2], o.channel, p.grid[2], row.count, to,
                     row.count, kWidth, limit);
          to += p.grid[2] * row.count;
        }
    }
}

// The first and the number of the indices i in [0, n) for which 0 <= i * stride + offset < size.
DP2VAE_INLINE Span inside(int64_t n, int64_t stride, int64_t offset, int64_t size) {
  int64_t begin = offset < 0 ? (-offset + stride - 1) / stride : 0;
  int64_t end = size - offset <= 0 ? 0 : (size - offset - 1) / stride + 1;
  if (end > n) end = n;
  if (begin > end) begin = end;
  return {begin, end - begin};
}

// `count` channels of `pixels` pixels that lie one after the other, in rows as long as the input is wide, to
// the first columns of a slab, from the slot of (z, 0, 0) on: blocks of lanes by lanes, across the ends of
// rows.
template <class T>
DP2VAE_INLINE void turn_pixels(const Product& p, const Layout& l, const T* from, int64_t pixels,
                               int64_t count, int64_t z, float* to, int64_t width) {
  const int64_t row_end = l.box[2] - p.size[2], plane_end = (l.box[1] - p.size[1]) * l.box[2];
  int64_t slot = (z * l.box[1] + p.padding[1]) * l.box[2] + p.padding[2], x = 0, y = 0;
  for (int64_t q = 0; q < pixels; q += kWidth) {
    const int64_t here = pixels - q < kWidth ? pixels - q : kWidth;
    int64_t slots[kWidth];
    for (int64_t k = 0; k < here; ++k) {
      slots[k] = slot++ * width;
      if (++x == p.size[2]) {
        x = 0;
        slot += row_end;
        if (++y == p.size[1]) {
          y = 0;
          slot += plane_end;
        }
      }
    }
    for (int64_t c = 0; c < count; c += kWidth) {
      const int64_t channels = count - c < kWidth ? count - c : kWidth;
      const T* block = from + c * p.spread.channel + q;
      if (here < kWidth) {
        for (int64_t k = 0; k < here; ++k)
          for (int64_t i = 0; i < channels; ++i)
            to[slots[k] + c + i] = value(block, i * p.spread.channel + k);
        continue;
      }
      F rows[kWidth];
      load_block(block, p.spread.channel, channels, rows);
      transpose(rows);
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) store(to + slots[k] + c, rows[k]);
    }
  }
}

// Channels [first, first + count) of a group's pixels to columns [0, count) of a slab.
template <class T>
void pack_pixels(const Product& p, const Layout& l, const T* from, int64_t count, float* to, int64_t width) {
  const Operand& o = p.spread;
  const Span z = inside(l.box[0], 1, -p.padding[0], p.size[0]);
  const Span y = inside(l.box[1], 1, -p.padding[1], p.size[1]);
  const Span x = inside(l.box[2], 1, -p.padding[2], p.size[2]);
  const bool one_run = o.axis[2] == 1 && o.axis[1] == p.size[2] &&
                       (p.size[0] == 1 || o.axis[0] == p.size[1] * p.size[2]) && x.count == p.size[2] &&
                       y.count == p.size[1];
  if (one_run) {
    turn_pixels(p, l, from + (z.begin - p.padding[0]) * o.axis[0], z.count * y.count * x.count, count,
                z.begin, to, width);
    return;
  }
  for (int64_t i = z.begin; i < z.begin + z.count; ++i)
    for (int64_t j = y.begin; j < y.begin + y.count; ++j)
      copy_block(from + (i - p.padding[0]) * o.axis[0] + (j - p.padding[1]) * o.axis[1] +
                     (x.begin - p.padding[2]) * o.axis[2],
                 o.axis[2], o.channel, x.count, count, to + ((i * l.box[1] + j) * l.box[2] + x.begin) * width,
                 width);
}

// Whether the numbers that a row of taps reads lie together in memory.
DP2VAE_INLINE bool taps_lie_together(const Product& p) {
  return (p.channels == 1 || p.spread.channel == 1) && p.dilation[2] * p.spread.axis[2] == p.channels;
}

// A group's pixels with their channels side by side.
template <class T>
DP2VAE_INLINE void interleave(const Product& p, const T* from, float* to) {
  const Operand& o = p.spread;
  for (int64_t z = 0; z < p.size[0]; ++z)
    for (int64_t y = 0; y < p.size[1]; ++y, to += p.size[2] * p.channels)
      copy_block(from + z * o.axis[0] + y * o.axis[1], o.axis[2], o.channel, p.size[2], p.channels, to,
                 p.channels);
}

// All columns of a group, taps times channels, in runs of one row of taps that lie together in `o`: whole
// ones for positions in [begin, end).
template <class T>
void pack_runs(const Product& p, const Operand& o, const T* from, float* to, int64_t width) {
  const int64_t run = p.kernel[2] * p.channels, hop = p.stride[2] * o.axis[2];
  const Span whole =
      inside(p.grid[2], p.stride[2], -p.padding[2], p.size[2] - (p.kernel[2] - 1) * p.dilation[2]);
  const int64_t begin = whole.begin, end = whole.begin + whole.count;
  for (int64_t z = 0; z < p.grid[0]; ++z)
    for (int64_t y = 0; y < p.grid[1]; ++y, to += p.grid[2] * width)
      for (int64_t row = 0; row < p.kernel[0] * p.kernel[1]; ++row) {
        const int64_t i = z * p.stride[0] + row / p.kernel[1] * p.dilation[0] - p.padding[0];
        const int64_t j = y * p.stride[1] + row % p.kernel[1] * p.dilation[1] - p.padding[1];
        if (i < 0 || i >= p.size[0] || j < 0 || j >= p.size[1]) continue;
        const T* pixels = from + i * o.axis[0] + j * o.axis[1] - p.padding[2] * o.axis[2];
        float* out = to + row * run;
        const auto part = [&](int64_t x) {
          const Span tap = inside(p.kernel[2], p.dilation[2], x * p.stride[2] - p.padding[2], p.size[2]);
          copy_run(pixels + x * hop + tap.begin * p.channels, tap.count * p.channels,
                   out + x * width + tap.begin * p.channels);
        };
        for (int64_t x = 0; x < begin; ++x) part(x);
        if (run == 4)  // one move, when it is known: the last layer of a decoder of grey images
          for (int64_t x = begin; x < end; ++x) copy_run(pixels + x * hop, 4, out + x * width);
        else
          for (int64_t x = begin; x < end; ++x) copy_run(pixels + x * hop, run, out + x * width);
        for (int64_t x = end; x < p.grid[2]; ++x) part(x);
      }
}

// Columns [first, first + count) of a group, of the taps times channels that there are, to columns of a slab.
template <class T>
void pack_unfolded(const Product& p, const T* from, int64_t first, int64_t count, float* to, int64_t width) {
  const Operand& o = p.spread;
  for (int64_t z = 0; z < p.grid[0]; ++z)
    for (int64_t y = 0; y < p.grid[1]; ++y, to += p.grid[2] * width)
      for (int64_t column = first; column < first + count; ++column) {
        const int64_t tap = column / p.channels, channel = column % p.channels;
        const int64_t i = z * p.stride[0] + tap / (p.kernel[1] * p.kernel[2]) * p.dilation[0] - p.padding[0];
        const int64_t j = y * p.stride[1] + tap / p.kernel[2] % p.kernel[1] * p.dilation[1] - p.padding[1];
        if (i < 0 || i >= p.size[0] || j < 0 || j >= p.size[1]) continue;
        const int64_t offset = tap % p.kernel[2] * p.dilation[2] - p.padding[2];
        const Span x = inside(p.grid[2], p.stride[2], offset, p.size[2]);
        const int64_t hop = p.stride[2] * o.axis[2];
        const T* row = from + channel * o.channel + i * o.axis[0] + j * o.axis[1] + offset * o.axis[2];
        float* out = to + column - first;
        for (int64_t k = x.begin; k < x.begin + x.count; ++k) out[k * width] = value(row, k * hop);
      }
}

template <class T>
void pack_spread(const Product& p, const Layout& l, int64_t n, int64_t place, int64_t block, float* packed) {
  const T* data = static_cast<const T*>(p.spread.data) + n * p.spread.record;
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t j = 0; j < l.column_tiles; ++j) {
      const Span v = span(l.vectors, l.column_tiles, j);
      const int64_t first = v.begin * kWidth, width = v.count * kWidth;
      const int64_t count = l.columns - first < width ? l.columns - first : width;
      float* to = packed + ((g * l.vectors + v.begin) * block + place * v.count) * kWidth * l.slots;
      const T* from = data + g * p.channels * p.spread.channel;
      if (l.unfolded && count == l.columns && taps_lie_together(p)) {
        pack_runs(p, p.spread, from, to, width);
      } else if (l.unfolded && count == l.columns && p.dilation[2] == 1) {
        const int64_t row = p.size[2] * p.channels;
        const Buffer pixels(p.size[0] * p.size[1] * row);
        interleave(p, from, pixels.data());
        pack_runs(p, {pixels.data(), false, 0, 1, {p.size[1] * row, row, p.channels}}, pixels.data(), to,
                  width);
      } else if (l.unfolded) {
        pack_unfolded(p, from, first, count, to, width);
      } else {
        pack_pixels(p, l, from + first * p.spread.channel, count, to, width);
      }
    }
}

void pack(const Product& p, const Layout& l, int64_t n, int64_t place, int64_t block, float* plain,
          float* spread) {
  p.plain.bf16 ? pack_plain<uint16_t>(p, l, n, place, block, plain)
               : pack_plain<float>(p, l, n, place, block, plain);
  p.spread.bf16 ? pack_spread<uint16_t>(p, l, n, place, block, spread)
                : pack_spread<float>(p, l, n, place, block, spread);
}

// A tile of a record's product: the whole sum over positions, in chunks.
DP2VAE_INLINE void product_tile(int64_t positions, Span row, int64_t vectors, const float* left,
                                const float* right, const int32_t* at, float* out, int64_t out_step) {
  const Tile kernel = kTiles[vectors][row.count];
  const int64_t parts = chunks(positions);
  for (int64_t c = 0; c < parts; ++c) {
    const Span t = span(positions, parts, c);
    kernel(t.count, left + t.begin * row.count, row.count, right, at + t.begin, 1, c > 0, out, out_step);
  }
}

void weigh(const Product& p, const Layout& l, int64_t block, int64_t count, const float* plain,
           const float* spread, const float* factors, int64_t first, int64_t end, float* total) {
  const int64_t positions = p.positions();
  alignas(64) float partial[14 * kMaxVectors * kWidth];
  for (int64_t each = first; each < end; ++each) {
    const int64_t g = each / (l.row_tiles * l.column_tiles);
    const Span row = span(p.rows, l.row_tiles, each / l.column_tiles % l.row_tiles);
    const Span v = span(l.vectors, l.column_tiles, each % l.column_tiles);
    const int64_t width = v.count * kWidth, area = row.count * width;
    const float* left = plain + (g * p.rows + row.begin) * block * positions;
    const float* right = spread + (g * l.vectors + v.begin) * kWidth * block * l.slots;
    float* out = total + ((g * p.rows + row.begin) * l.width() + row.count * v.begin * kWidth) * l.taps;
    const Tile kernel = kTiles[v.count][row.count];
    for (int64_t tap = 0; tap < l.taps; ++tap, out += area)
      for (int64_t r = 0; r < count; ++r) {
        if (factors[r] == 0) continue;
        const float* a = left + r * row.count * positions;
        const float* b = right + (r * l.slots + l.tap_slot[tap]) * width;
        if (positions <= kChunk) {
          kernel(positions, a, row.count, b, l.at[v.count], factors[r], true, out, width);
        } else {
          product_tile(positions, row, v.count, a, b, l.at[v.count], partial, width);
          const F factor = all(factors[r]);
          for (int64_t i = 0; i < area; i += kWidth)
            store(out + i, fma(factor, load(partial + i), load(out + i)));
        }
      }
  }
}

// In the order in which `out` lies: a block that is turned may write over what comes after it.
void unpack(const Product& p, const Layout& l, const float* total, float* out) {
  const int64_t taps = p.taps(), room = taps <= kWidth ? kWidth : taps;
  const float* const limit = out + p.numbers();
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < l.row_tiles; ++i) {
      const Span row = span(p.rows, l.row_tiles, i);
      const float* const tiles = total + (g * p.rows + row.begin) * l.width() * l.taps;
      for (int64_t r = 0; r < row.count; ++r, out += p.channels * taps)
        for (int64_t j = 0; j < l.column_tiles; ++j) {
          const Span v = span(l.vectors, l.column_tiles, j);
          const int64_t first = v.begin * kWidth, width = v.count * kWidth;
          const int64_t count = l.columns - first < width ? l.columns - first : width;
          const float* from = tiles + row.count * first * l.taps + r * width;
          if (l.unfolded)
            for (int64_t c = first; c < first + count; ++c)
              out[c % p.channels * taps + c / p.channels] = from[c - first];
          else if (taps == 1)
            copy_run(from, count, out + first);
          else
            turn_block(from, 1, row.count * width, count, taps, out + first * taps, taps, room, limit);
        }
    }
}

void form(const Product& p, const Layout& l, const float* plain, const float* spread, float* out) {
  const int64_t positions = p.positions(), step = l.taps * l.columns;
  alignas(64) float partial[14 * kMaxVectors * kWidth];
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t j = 0; j < l.column_tiles; ++j) {
      const Span v = span(l.vectors, l.column_tiles, j);
      const int64_t first = v.begin * kWidth, width = v.count * kWidth;
      const float* right = spread + (g * l.vectors + v.begin) * kWidth * l.slots;
      for (int64_t i = 0; i < l.row_tiles; ++i) {
        const Span row = span(p.rows, l.row_tiles, i);
        const float* left = plain + (g * p.rows + row.begin) * positions;
        for (int64_t tap = 0; tap < l.taps; ++tap) {
          const float* b = right + l.tap_slot[tap] * width;
          float* to = out + (g * p.rows + row.begin) * step + tap * l.columns + first;
          if (first + width <= l.columns) {
            product_tile(positions, row, v.count, left, b, l.at[v.count], to, step);
          } else {
            product_tile(positions, row, v.count, left, b, l.at[v.count], partial, width);
            for (int64_t r = 0; r < row.count; ++r)
              memcpy(to + r * step, partial + r * width, sizeof(float) * (l.columns - first));
          }
        }
      }
    }
}

double squares(const float* values, int64_t n) {
  constexpr int64_t kRun = 256 * kWidth;  // 64 terms of a lane of each sum
  Wide total = {};
  double rest = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = n - begin < kRun ? n - begin : kRun;
    F sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth)
      for (int k = 0; k < 4; ++k) {
        const F x = load(values + begin + i + k * kWidth);
        sums[k] = fma(x, x, sums[k]);
      }
    for (int k = 0; k < 4; ++k) add(total, sums[k]);
    for (; i < count; ++i) rest += static_cast<double>(values[begin + i]) * values[begin + i];
  }
  return sum(total) + rest;
}

void weigh_kept(const float* values, const float* factors, int64_t records, int64_t n, int64_t first,
                int64_t end, float* out) {
  constexpr int64_t kRun = 1024;  // columns that stay in cache
  constexpr int64_t kPart = 32;   // records whose sum is formed in float32
  alignas(64) float part[kRun];
  alignas(64) double total[kRun];
  for (int64_t begin = first; begin < end; begin += kRun) {
    const int64_t count = end - begin < kRun ? end - begin : kRun;
    for (int64_t i = 0; i < count; ++i) total[i] = 0;
    for (int64_t from = 0; from < records; from += kPart) {
      for (int64_t i = 0; i < count; ++i) part[i] = 0;
      const int64_t to = records - from < kPart ? records : from + kPart;
      for (int64_t r = from; r < to; ++r) {
        if (factors[r] == 0) continue;
        const float* row = values + r * n + begin;
        const float factor = factors[r];
        for (int64_t i = 0; i < count; ++i) part[i] += factor * row[i];
      }
      for (int64_t i = 0; i < count; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = static_cast<float>(total[i]);
  }
}

extern const ProductKernels product_kernels = {
    kWidth,    {0, kMaxRows[1], kMaxRows[2], kMaxRows[3], kMaxRows[4]}, pack, weigh, unpack, form, squares,
    weigh_kept};

}  // namespace dp2vae::DP2VAE_ISA
