// The limits of a GPU: loops that do one thing only.
//
// Maths   read_all   words[b] = the sum of the words that block b reads
//         loop_*     each accumulator d: d = d + a b, `rounds` times
// Work    read_all: every byte once, in pieces of 16, four on their way for each thread.
//         loop_*: of a warp and a round STREAMS products that do not wait for each other: of 16 x 8 x 32 bytes,
//         of 16 x 8 x 16 bf16; f32: of a thread STREAMS multiply-adds.
// Limit   the memory; the matrix instruction mma.sync, or the multiply-adds. Hopper's wgmma, which takes whole
//         tiles from shared memory, reaches more than its mma.sync; no kernel here uses it.
// Exact   all results: sums of integers, and of floats that are whole numbers below 2^24
#include "common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 STREAMS = 8;

extern "C" __global__ void __launch_bounds__(THREADS) read_all(
    const U32x4* from,    // [count]
    u32 count,            // pieces of 16 bytes
    u32* sums             // [blocks]
) {
  __shared__ u32 parts[WARP];
  constexpr u32 AHEAD = 4;
  u32 step = gridDim.x * THREADS;
  u32 sum = 0;
  u32 i = blockIdx.x * THREADS + threadIdx.x;
  for (; i + (u64)(AHEAD - 1) * step < count; i += AHEAD * step) {
    U32x4 v[AHEAD];
#pragma unroll
    for (u32 j = 0; j < AHEAD; j++) v[j] = load_once16(from + i + j * step);
#pragma unroll
    for (u32 j = 0; j < AHEAD; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
  }
  for (; i < count; i += step) {
    U32x4 v = load_once16(from + i);
    sum += v.x + v.y + v.z + v.w;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x < WARP) {
    sum = warp_sum(threadIdx.x < THREADS / WARP ? parts[threadIdx.x] : 0u);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

// `ones` are four bytes, two bf16 or one f32, each 1: an argument, so that nothing is known beforehand.
template <class T, void (*MULTIPLY)(T*, const u32*, const u32*)>
__device__ __forceinline__ void matrices(u32 rounds, u32 ones, u32* sums) {
  T d[STREAMS][4] = {};
  u32 a[4] = {ones, ones, ones, ones}, b[2] = {ones, ones};
  for (u32 round = 0; round < rounds; round++) {
#pragma unroll
    for (u32 s = 0; s < STREAMS; s++) MULTIPLY(d[s], a, b);
  }
  u32 sum = 0;
#pragma unroll
  for (u32 s = 0; s < STREAMS; s++) sum += (u32)d[s][0] + (u32)d[s][1] + (u32)d[s][2] + (u32)d[s][3];
  sums[blockIdx.x * THREADS + threadIdx.x] = sum;
}

// `sums` of all three are [blocks, THREADS].
extern "C" __global__ void __launch_bounds__(THREADS) loop_int8(u32 rounds, u32 ones, u32* sums) {
  matrices<i32, mma_s8>(rounds, ones, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) loop_bf16(u32 rounds, u32 ones, u32* sums) {
  matrices<float, mma_bf16>(rounds, ones, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) loop_f32(u32 rounds, u32 ones, u32* sums) {
  // From different numbers on, or the compiler would make one stream of all.
  float d[STREAMS];
#pragma unroll
  for (u32 s = 0; s < STREAMS; s++) d[s] = (float)s;
  float a = __uint_as_float(ones), b = a;
  for (u32 round = 0; round < rounds; round++) {
#pragma unroll
    for (u32 s = 0; s < STREAMS; s++) d[s] = fmaf(a, b, d[s]);
  }
  u32 sum = 0;
#pragma unroll
  for (u32 s = 0; s < STREAMS; s++) sum += (u32)d[s];
  sums[blockIdx.x * THREADS + threadIdx.x] = sum;
}
