// All matrix products.
#include "common.cuh"
