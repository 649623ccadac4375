// Rotary embedding, the cache, attention.
#include "common.cuh"
