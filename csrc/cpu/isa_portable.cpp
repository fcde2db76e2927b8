#define DP2VAE_LANES 4
#include "kernels.h"
