#define DP2VAE_LANES 4
#include "noise_kernels.h"
