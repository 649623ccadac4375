// Choosing tokens.
#include "common.cuh"
