#include "noise_kernels.h"
