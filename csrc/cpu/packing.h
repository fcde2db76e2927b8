// How the operands of products are packed for the tiles of one instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace dp2vae {

// A layout and what it points to.
struct Packing {
  Layout layout;
  std::vector<int32_t> at[kMaxVectors + 1];
  std::vector<int64_t> tap_slot;

  Packing(const Product& p, const ProductKernels& k);
  Packing(const Packing&) = delete;
};

}  // namespace dp2vae
