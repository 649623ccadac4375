// What the sources take for granted of a device: conversions, warps, matrix products, copies. Tests launch
// these kernels on every device, and on the host device some that are wrong.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
probe_convert(const u32* bits, float* from_f16, float* from_bf16, u16* to_f16, u16* to_bf16, u32 n) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  from_f16[i] = f16_to_f32((u16)bits[i]);
  from_bf16[i] = bf16_to_f32((u16)bits[i]);
  to_f16[i] = f32_to_f16(__uint_as_float(bits[i]));
  to_bf16[i] = f32_to_bf16(__uint_as_float(bits[i]));
}

extern "C" __global__ void __launch_bounds__(96)
probe_warp(const float* x, float* sum, float* largest, u32* below, float* whole, float* next) {
  __shared__ float parts[WARP];
  u32 i = threadIdx.x;
  sum[i] = warp_sum(x[i]);
  largest[i] = warp_max(x[i]);
  below[i] = __ballot_sync(ALL_LANES, x[i] < 0);
  whole[i] = block_sum(x[i], parts);
  next[i] = __shfl_sync(ALL_LANES, x[i], i + 1);
}

// d += a b, with a [16, k] and b [8, k] as words of 32 bits, four or two values each, and d [16, 8].
template <class Sum, class Multiply>
__device__ __forceinline__ void multiply(const u32* a, const u32* b, Sum* d, Multiply mma) {
  u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
  u32 own_a[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  u32 own_b[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  Sum* rows[2] = {d + g * 8 + 2 * t, d + (g + 8) * 8 + 2 * t};
  Sum own[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma(own, own_a, own_b);
  rows[0][0] = own[0];
  rows[0][1] = own[1];
  rows[1][0] = own[2];
  rows[1][1] = own[3];
}

extern "C" __global__ void __launch_bounds__(32) probe_mma_s8(const u32* a, const u32* b, i32* d) {
  multiply(a, b, d, [](i32* d, const u32* a, const u32* b) { mma_s8(d, a, b); });
}
extern "C" __global__ void __launch_bounds__(32) probe_mma_u8s8(const u32* a, const u32* b, i32* d) {
  multiply(a, b, d, [](i32* d, const u32* a, const u32* b) { mma_u8s8(d, a, b); });
}
extern "C" __global__ void __launch_bounds__(32) probe_mma_bf16(const u32* a, const u32* b, float* d) {
  multiply(a, b, d, [](float* d, const u32* a, const u32* b) { mma_bf16(d, a, b); });
}
extern "C" __global__ void __launch_bounds__(32) probe_mma_f16(const u32* a, const u32* b, float* d) {
  multiply(a, b, d, [](float* d, const u32* a, const u32* b) { mma_f16(d, a, b); });
}

// to = from, 16 bytes a thread and step, each step's copy on its way while the one before is read.
extern "C" __global__ void __launch_bounds__(64) probe_copy(const U32x4* from, U32x4* to, u32 steps) {
  DYN_SHARED(U32x4, stages);  // [2, threads]
  u32 n = blockDim.x, i = threadIdx.x;
  cp_async16(&stages[i], &from[i]);
  cp_async_commit();
  for (u32 step = 0; step < steps; step++) {
    if (step + 1 < steps) cp_async16(&stages[(step + 1) % 2 * n + i], &from[(step + 1) * n + i]);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    // What another thread has copied.
    to[step * n + n - 1 - i] = stages[step % 2 * n + n - 1 - i];
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(64) probe_count(u32* n, u32 by) {
  if (threadIdx.x == 0) *n += by;
}

// ---- wrong ones: for the host device alone ---------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(64) probe_no_barrier(u32* y) {
  __shared__ u32 x[64];
  x[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = x[63 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) probe_no_wait(const U32x4* from, U32x4* to) {
  DYN_SHARED(U32x4, stage);
  cp_async16(&stage[threadIdx.x], &from[threadIdx.x]);
  cp_async_commit();
  __syncthreads();
  to[threadIdx.x] = stage[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32) probe_deadlock(u32* y) {
  if (threadIdx.x < 16) __syncthreads();
  else *y = __shfl_xor_sync(ALL_LANES, 1u, 1);
}

extern "C" __global__ void __launch_bounds__(32) probe_outside(u32* y, u32 at) {
  y[at] = 1;
}
