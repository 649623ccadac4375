// What is done to each value, or each row, alone; the maths and the contracts are in elementwise.rs.
#include "common.cuh"

// One thread a logit.
extern "C" __global__ void __launch_bounds__(256) finish_logits(
    float* logits,      // [rows, vocab]
    const u32* unused,  // [ranges, 2]: first and end
    u32 rows, u32 vocab, float divisor, u32 ranges) {
  u32 row = blockIdx.x, id = blockIdx.y * blockDim.x + threadIdx.x;
  if (id >= vocab) return;
  float v = logits[(u64)row * vocab + id] / divisor;
  for (u32 i = 0; i < ranges; i++)
    if (id >= unused[2 * i] && id < unused[2 * i + 1]) v = -3.40282347e38f;
  logits[(u64)row * vocab + id] = v;
}
