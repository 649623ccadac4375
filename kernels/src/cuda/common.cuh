// What all sources of kernels share. They include this file and nothing else, so that NVRTC can compile
// them where there is no CUDA toolkit, and any C++ compiler can behind `host/shim.h`.
//
// The part for the GPU alone is inline PTX (the PTX ISA, chapters named below); the shim defines the same
// names for the CPU. Compiled with --fmad=false: a product and a sum round twice, as they do on the CPU,
// unless fmaf is written.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;

// What is loaded and stored at once, from an address that is a multiple of its size.
struct alignas(8) U32x2 { u32 x, y; };
struct alignas(16) U32x4 { u32 x, y, z, w; };
struct alignas(16) F32x4 { float x, y, z, w; };

static const u32 WARP = 32;
static const u32 ALL_LANES = 0xFFFFFFFFu;

#ifndef PHIDIAS_SHIM

// Shared memory whose size is an argument of the launch, as `T* name`.
#define DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared[];  \
  T* name = reinterpret_cast<T*>(dynamic_shared)

__device__ __forceinline__ float f16_to_f32(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

// To nearest, ties to even.
__device__ __forceinline__ u16 f32_to_f16(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// c plus the inner product of two times four signed bytes.
__device__ __forceinline__ i32 dp4a(i32 a, i32 b, i32 c) { return __dp4a(a, b, c); }

// The matrix products of a warp, d += a b ("Matrix multiply-accumulate operation using mma instruction").
// With g = lane / 4 and t = lane % 4, a lane holds of a (16 rows), b (8 columns) and d (16 by 8)
//
//   8-bit, k = 32      a[0], a[1]: rows g and g + 8, k = 4 t .. 4 t + 3;  a[2], a[3]: the same rows, k + 16
//                      b[0]: column g, k = 4 t .. 4 t + 3;                b[1]: k + 16
//   16-bit, k = 16     a[0], a[1]: rows g and g + 8, k = 2 t, 2 t + 1;    a[2], a[3]: the same rows, k + 8
//                      b[0]: column g, k = 2 t, 2 t + 1;                  b[1]: k + 8
//   both               d[0], d[1]: row g, columns 2 t, 2 t + 1;           d[2], d[3]: row g + 8
//
// the lowest k in the lowest bits.
__device__ __forceinline__ void mma_s8(i32 d[4], const u32 a[4], const u32 b[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with unsigned bytes in a.
__device__ __forceinline__ void mma_u8s8(i32 d[4], const u32 a[4], const u32 b[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = c + a b, where the same c is needed again.
__device__ __forceinline__ void mma_u8s8(i32 d[4], const u32 a[4], const u32 b[2], const i32 c[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// The products are exact; how their sum is rounded is the hardware's affair, to about f32.
__device__ __forceinline__ void mma_bf16(float d[4], const u32 a[4], const u32 b[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float d[4], const u32 a[4], const u32 b[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes to shared memory without waiting; both addresses are multiples of 16. They are there
// for this thread after the wait, for others after a barrier behind it.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

// The same with 8 bytes.
__device__ __forceinline__ void cp_async8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the last `N`.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Sixteen bytes that nobody reads again and no kernel writes. They stay out of the first cache.
__device__ __forceinline__ U32x4 load_once16(const void* global) {
  U32x4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
  return v;
}

// 2^x in one instruction: off by up to 2^-22 of the result, which expf's two units in the last place
// (2^-22.6) hardly beat; but it takes x times log2(e), and that product's rounding counts |x| times.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A kernel of a source that `Source::overlaps` begins with these two. The first lets the next kernel begin: its
// blocks take the places that are free, and wait in the second until this kernel has ended. In between nothing is
// touched that another kernel writes; weights are read ahead there. They come in every kernel, so one that has
// ended has seen all before it end. (PTX ISA, "griddepcontrol"; sm_90.)
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

inline void let_next_begin() {}
inline void await_previous() {}
inline U32x4 load_once16(const void* global) { return *static_cast<const U32x4*>(global); }

#endif

// Both at once, where nothing is read ahead.
__device__ __forceinline__ void after_previous() {
  let_next_begin();
  await_previous();
}

__device__ __forceinline__ float bf16_to_f32(u16 b) { return __uint_as_float((u32)b << 16); }

// To nearest, ties to even: half a unit is added, less one where the last bit kept is 0. A NaN stays one.
__device__ __forceinline__ u16 f32_to_bf16(float f) {
  u32 bits = __float_as_uint(f);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (u16)(bits >> 16 | 0x40u);
  return (u16)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// The sum over the lanes of a warp, the same bits in every lane: a tree over lanes 16, 8, 4, 2, 1 apart.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(ALL_LANES, v, apart);
  return v;
}

// The largest over the lanes of a warp; a NaN beside a number is passed over.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, apart));
  return v;
}

// The sum over the threads of a block of whole warps, in one row (blockDim.y = 1), the same bits in every
// thread: the warps' sums, then the tree over those. `parts` is shared, with a place for each of 32 warps;
// it may be used again at once.
__device__ __forceinline__ float block_sum(float v, float parts[WARP]) {
  u32 lane = threadIdx.x % WARP;
  v = warp_sum(v);
  if (lane == 0) parts[threadIdx.x / WARP] = v;
  __syncthreads();
  v = warp_sum(lane < blockDim.x / WARP ? parts[lane] : 0.0f);
  __syncthreads();
  return v;
}

// What a block of 32 signed bytes has beside them, see `quant/src/activations.rs`.
struct alignas(8) Head {
  i32 start;
  float magic;
};

// How a block of 32 values becomes signed bytes: `activations::step`.
struct ByteStep {
  float scale, inverse;
  bool holds;  // the values are finite

  // As integers, magnitudes are in their order, infinity above them and NaNs above infinity.
  static __device__ __forceinline__ u32 magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }

  // The smallest power of two with `largest` <= 127 * scale.
  static __device__ __forceinline__ ByteStep of(u32 largest) {
    i32 exponent = (i32)((largest + 0x1FFFFu) >> 23) - 127 - 6;
    bool holds = exponent <= 103;
    exponent = max(exponent, -120);
    float scale = holds ? __uint_as_float((u32)(exponent + 127) << 23) : __uint_as_float(0x7FC00000u);
    return {scale, __uint_as_float((u32)(127 - exponent) << 23), holds};
  }

  // v * inverse to the nearest integer, ties to even, as a byte: the adder leaves it in the lowest bits.
  __device__ __forceinline__ u32 quant(float v) const { return holds ? __float_as_uint(v * inverse + MAGIC) & 0xFFu : 0; }

  // Of quants with that sum, for weights with that zero point.
  __device__ __forceinline__ Head head(i32 sum, i32 zero) const {
    float magic = MAGIC * scale;
    return {(i32)(__float_as_uint(magic) - (u32)(zero * sum)), magic};
  }

 private:
  static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
};

// Where a kernel's results go: rows of f32, or as the next matrix takes them.
struct Results {
  void* values;   // [rows][stride]
  Head* heads;    // [rows][stride / 32], of bytes
  u32 stride;     // columns, for a matrix in whole 32s
  u32 form;       // 0: f32, 1: bf16, 2: signed bytes
  i32 zero;       // of the weights that bytes will meet

  __device__ __forceinline__ float* row(u32 row) const { return static_cast<float*>(values) + (u64)row * stride; }

  // A lane puts `v` of one column. Where it becomes bytes, a warp has a block of 32, all its lanes here.
  __device__ __forceinline__ void put(u32 at_row, u32 column, float v) const {
    if (form == 0) {
      if (column < stride) row(at_row)[column] = v;
      return;
    }
    u64 at = (u64)at_row * stride + column;
    if (form == 1) {
      static_cast<u16*>(values)[at] = f32_to_bf16(v);
      return;
    }
    u32 largest = ByteStep::magnitude(v);
#pragma unroll
    for (u32 apart = WARP / 2; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
    ByteStep step = ByteStep::of(largest);
    i8 quant = (i8)step.quant(v);
    i32 sum = warp_sum((i32)quant);
    static_cast<i8*>(values)[at] = quant;
    if (column % WARP == 0) heads[at / WARP] = step.head(sum, zero);
  }
};
