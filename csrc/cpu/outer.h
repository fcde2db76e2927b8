// Sums over records of outer products: what linear layers of one position have for weight gradients.
//
//   out[row][column] = sum over n of factors[n] * plain[n, row] * spread[n, column]
//
// Records take the place of a product's positions (product.h), and the sum is written where it belongs, row
// after row.
#pragma once

#include <cstdint>

#include "product.h"

namespace dp2vae {

// Tiles [first, end) of a layout's rows or columns.
struct Tiles {
  int64_t first, end;
};

// Records whose terms are added to `out` together, and how they lie in packed memory: part after part, in a
// part tile after tile, in a tile record after record.
struct OuterBlock {
  const int64_t* records;  // of a factor other than 0
  const float* factors;    // by record
  int64_t count, parts;    // the terms of a part are added up in one accumulator
  bool first;              // nothing is in `out` yet
  Tiles columns;           // that are packed at a time
};

struct OuterKernels {
  // Packs some tiles of a block's columns, times the factors.
  void (*pack_columns)(const Product& p, const Layout& l, const OuterBlock& block, Tiles columns,
                       float* spread);
  // Packs tiles of rows into `plain` and adds their products with the block's columns. `edge` has room for
  // these rows of one column tile.
  void (*add_rows)(const Product& p, const Layout& l, const OuterBlock& block, Tiles rows,
                   const float* spread, float* plain, float* edge, float* out);
};

namespace portable {
extern const OuterKernels outer_kernels;
}
namespace avx2 {
extern const OuterKernels outer_kernels;
}
namespace avx512 {
extern const OuterKernels outer_kernels;
}

}  // namespace dp2vae
