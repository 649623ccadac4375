// Tokens grouped by expert, and the experts' products.
#include "common.cuh"
