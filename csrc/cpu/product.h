// Products of a plain and a spread operand, one a record: what linear layers and convolutions have for weight
// gradients.
//
//   G[n][row][tap][channel] = sum over positions t of plain[n, row, t] * spread[n, channel, pixel(t, tap)]
//
// A convolution's plain operand is its output gradient and its spread one the input, which is read through
// the taps; for a transposed convolution it is the other way round, and a linear layer has one tap.
//
// Every record's product is formed apart from all others, by one order of additions that depends on T alone,
// whatever is made of it: kept, squared or added up. So a record's part of a sum is what its norm was taken
// of.
#pragma once

#include <cstdint>

#include "../common.h"

namespace dp2vae {

// Positions whose terms are added up in one accumulator; with more of them, such partial sums are added.
constexpr int64_t kChunk = 64;
// Records whose sum is formed in float32, and parts of so many that are: precision.py counts on both.
constexpr int64_t kRecordsPerPart = 128, kPartsPerBlock = 16;
// Roundings that a square passes through in a sum of squares, at most.
constexpr int64_t kSquaresDepth = 80;
constexpr int kMaxVectors = 4;  // of a row of a tile

// A tensor of float32 or bfloat16, strides in elements.
struct Operand {
  const void* data;
  bool bf16;
  int64_t record, channel, axis[3];
};

struct Product {
  int64_t records, groups, rows, channels;  // rows and channels of one group
  int64_t grid[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t size[3];  // of the spread operand
  Operand plain, spread;

  DP2VAE_INLINE int64_t positions() const { return grid[0] * grid[1] * grid[2]; }
  DP2VAE_INLINE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  DP2VAE_INLINE int64_t numbers() const { return groups * rows * channels * taps(); }
};

// `n` things dealt to `parts` as evenly as possible: where part i begins.
DP2VAE_INLINE int64_t part_begin(int64_t n, int64_t parts, int64_t i) { return i * n / parts; }

// As few parts of at most `most` things as hold `n`.
DP2VAE_INLINE int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

// Parts of at most kChunk positions.
DP2VAE_INLINE int64_t chunks(int64_t positions) { return parts_of(positions, kChunk); }

// Additions that a term of a record's product passes through, at most.
inline int64_t product_depth(int64_t positions) {
  return positions <= kChunk ? positions : kChunk + chunks(positions);
}

// How the operands of a block of records are packed for the tiles of one instruction set.
//
// Rows are cut into row tiles, columns into column tiles of a few vectors, and a tile of an operand lies in
// memory as it is read: position after position, or for the spread operand slot after slot. A slot is a pixel
// of the part of the input that any tap reads, padding included, and a tap an offset between slots. Where a
// group has too few channels to fill a vector the spread operand is written out instead (`unfolded`): a slot
// is then a position, a column a pair of tap and channel, and there is one tap.
struct Layout {
  bool unfolded;
  int64_t lanes, taps, columns, vectors, row_tiles, column_tiles;
  int64_t box[3], slots;
  const int32_t*
      at[kMaxVectors + 1];  // slot of a position at tap 0, times the floats of a tile of 1 to 4 vectors
  const int64_t* tap_slot;  // what a tap adds to it

  DP2VAE_INLINE int64_t width() const { return vectors * lanes; }
  DP2VAE_INLINE int64_t plain_floats(const Product& p) const { return p.groups * p.rows * p.positions(); }
  DP2VAE_INLINE int64_t spread_floats(const Product& p) const { return p.groups * width() * slots; }
  DP2VAE_INLINE int64_t total_floats(const Product& p) const { return p.groups * p.rows * width() * taps; }
  DP2VAE_INLINE int64_t tiles(const Product& p) const { return p.groups * row_tiles * column_tiles; }
};

struct ProductKernels {
  int64_t lanes;
  int64_t max_rows[kMaxVectors + 1];  // of a tile of 1 to 4 vectors

  // Packs record n as number `place` of a block of `block` records; `spread` was zero before the first one.
  // What is padding stays zero as long as `block` is the same.
  void (*pack)(const Product& p, const Layout& l, int64_t n, int64_t place, int64_t block, float* plain,
               float* spread);
  // Adds factors[r] times the product of record r to `total`, for the first `count` records of a packed block
  // and tiles [first, end). Records of factor 0 are not looked at.
  void (*weigh)(const Product& p, const Layout& l, int64_t block, int64_t count, const float* plain,
                const float* spread, const float* factors, int64_t first, int64_t end, float* total);
  // `total`, which lies tile by tile, as [groups * rows, channels, taps].
  void (*unpack)(const Product& p, const Layout& l, const float* total, float* out);
  // The product of the one record of a packed block, as [groups * rows, taps, channels].
  void (*form)(const Product& p, const Layout& l, const float* plain, const float* spread, float* out);
  double (*squares)(const float* values, int64_t n);
  // out[i] = sum_n factors[n] values[n, i] for i in [first, end) of [records, n]; records of factor 0 are not
  // read.
  void (*weigh_kept)(const float* values, const float* factors, int64_t records, int64_t n, int64_t first,
                     int64_t end, float* out);
};

namespace portable {
extern const ProductKernels product_kernels;
}
namespace avx2 {
extern const ProductKernels product_kernels;
}
namespace avx512 {
extern const ProductKernels product_kernels;
}

// Those in use.
const ProductKernels& product_kernels_in_use();

}  // namespace dp2vae
