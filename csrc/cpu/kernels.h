// All that is compiled once per instruction set.
#include "affine_kernels.h"
#include "gram_kernels.h"
#include "noise_kernels.h"
#include "outer_kernels.h"
#include "product_kernels.h"
