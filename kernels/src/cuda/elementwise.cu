// What is done to each value, or each row, alone.
//
// Maths   those of the scalar kernels: `cpu/scalar/{mod, norm, activation}.rs` and
//         `quant/src/activations.rs`
//         embed          x[t] = multiplier * table[ids[t]]
//         *_norm         sum = x + branch; y = rms_norm(sum) or layer_norm(sum)
//         input          y = x
//         silu_mul       y[i] = up[i] * silu(gate[i]), a row of x is all gates, then all of `up`
//         gegelu         gates at even places of x, what they are for at odd ones
//         quick_gelu, gelu
// Layout  rows of f32, [rows, cols]. Results also as a matrix takes them, columns padded with zeros to
//         whole blocks of 32: bf16, or signed bytes with a head for each block
// Work    memory: each value read and written once. A norm keeps its row in shared memory between
//         its passes; every other kernel works in registers
// Limit   at one token, the time of a launch and of one trip to memory; at many, memory bandwidth
// Exact   all but the sums of the norms are the operations of the scalar kernels in their order; expf is
//         off by up to 2 units in the last place. A sum is in the order of the columns for one thread,
//         then in a tree over threads: a function of the columns alone. Bytes are exact functions of the
//         floats.
//
// A thread has four neighbouring columns, so eight threads have a block of 32: its largest magnitude and its
// sum are three shuffles each.
#include "common.cuh"

const u32 VALUES = 4;
const u32 BLOCK = 32;

// ---- columns of a row, four at a time; past its end there are zeros ------------------------------------

template <class Load>
__device__ __forceinline__ F32x4 columns(u32 at, u32 cols, Load load) {
  F32x4 v;
  v.x = at + 0 < cols ? load(at + 0) : 0;
  v.y = at + 1 < cols ? load(at + 1) : 0;
  v.z = at + 2 < cols ? load(at + 2) : 0;
  v.w = at + 3 < cols ? load(at + 3) : 0;
  return v;
}

// Rows begin at multiples of 16 bytes where `cols` is a multiple of 4.
__device__ __forceinline__ F32x4 load4(const float* row, u32 at, u32 cols) {
  if (cols % VALUES != 0) return columns(at, cols, [&](u32 i) { return row[i]; });
  if (at < cols) return *reinterpret_cast<const F32x4*>(row + at);
  return {0, 0, 0, 0};
}

__device__ __forceinline__ void store4(float* row, u32 at, u32 cols, F32x4 v) {
  if (cols % VALUES == 0) {
    if (at < cols) *reinterpret_cast<F32x4*>(row + at) = v;
    return;
  }
  if (at + 0 < cols) row[at + 0] = v.x;
  if (at + 1 < cols) row[at + 1] = v.y;
  if (at + 2 < cols) row[at + 2] = v.z;
  if (at + 3 < cols) row[at + 3] = v.w;
}

template <class F>
__device__ __forceinline__ F32x4 each(F32x4 v, F f) {
  return {f(v.x), f(v.y), f(v.z), f(v.w)};
}

// ---- where results go ----------------------------------------------------------------------------------
//
// A whole warp calls put, lane l with the columns from at = 4 l (and any multiple of 128) on.

struct Output {
  void* values;  // [rows, stride]
  Head* heads;   // [rows, stride / 32], of bytes
  u32 cols, stride;
  i32 zero;      // of the weights that bytes will meet
};

struct Floats {
  static __device__ __forceinline__ void put(const Output& out, u32 row, u32 at, F32x4 v) {
    store4(static_cast<float*>(out.values) + (u64)row * out.stride, at, out.stride, v);
  }
};

struct Rounded {
  static __device__ __forceinline__ void put(const Output& out, u32 row, u32 at, F32x4 v) {
    if (at >= out.stride) return;
    u32* values = reinterpret_cast<u32*>(static_cast<u16*>(out.values) + (u64)row * out.stride + at);
    values[0] = f32_to_bf16(v.x) | (u32)f32_to_bf16(v.y) << 16;
    values[1] = f32_to_bf16(v.z) | (u32)f32_to_bf16(v.w) << 16;
  }
};

struct Quantized {
  static __device__ __forceinline__ void put(const Output& out, u32 row, u32 at, F32x4 v) {
    auto magnitude = ByteStep::magnitude;
    u32 largest = max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
#pragma unroll
    for (u32 apart = BLOCK / VALUES / 2; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
    ByteStep step = ByteStep::of(largest);
    u32 quants = step.quant(v.x) | step.quant(v.y) << 8 | step.quant(v.z) << 16 | step.quant(v.w) << 24;
    i32 sum = dp4a((i32)quants, 0x01010101, 0);
#pragma unroll
    for (u32 apart = BLOCK / VALUES / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    if (at >= out.stride) return;
    *reinterpret_cast<u32*>(static_cast<i8*>(out.values) + (u64)row * out.stride + at) = quants;
    if (at % BLOCK == 0) out.heads[((u64)row * out.stride + at) / BLOCK] = step.head(sum, out.zero);
  }
};

// ---- single values ---------------------------------------------------------------------------------------

__device__ __forceinline__ float quick_gelu_of(float x) { return x / (1.0f + expf(-1.702f * x)); }

// `cpu/activation.rs` has the derivation.
__device__ __forceinline__ float gelu_of(float x) {
  float t = fminf(fabsf(x), 15.0f);
  float above = 0.004153216f, below = 0.010410456f;
  above = above * t + 0.04088103f;
  above = above * t + 0.18396884f;
  above = above * t + 0.439283f;
  above = above * t + 0.5f;
  below = below * t + 0.10247966f;
  below = below * t + 0.47140792f;
  below = below * t + 1.2055471f;
  below = below * t + 1.6764511f;
  below = below * t + 1.0f;
  float tail = t * (above / below) * expf(-0.5f * (t * t));
  // max(x, 0), but for a NaN, which only fminf passes over, and for minus infinity.
  return (0.5f * x + 0.5f * fabsf(x)) - tail;
}

__device__ __forceinline__ float silu_mul_of(float gate, float up) { return up * (gate / (1.0f + expf(-gate))); }

// Infinities are not clamped, and NaNs stay NaNs: minimum and maximum would pass over them.
__device__ __forceinline__ float gegelu_of(float a, float b, float limit) {
  const float infinity = __uint_as_float(0x7F800000u);
  if (a > limit && a < infinity) a = limit;
  if (b > limit && b < infinity) b = limit;
  if (b < -limit && b > -infinity) b = -limit;
  return quick_gelu_of(a) * (b + 1.0f);
}

// What a kernel makes of the columns at .. at + 4 of a row; `out` columns a row come out.
struct Same {
  static __device__ __forceinline__ F32x4 of(const float* x, u32 row, u32 at, u32 out, float) {
    return load4(x + (u64)row * out, at, out);
  }
};

struct SiluMul {
  static __device__ __forceinline__ F32x4 of(const float* x, u32 row, u32 at, u32 out, float) {
    F32x4 gate = load4(x + (u64)row * 2 * out, at, out);
    F32x4 up = load4(x + (u64)row * 2 * out + out, at, out);
    return {silu_mul_of(gate.x, up.x), silu_mul_of(gate.y, up.y), silu_mul_of(gate.z, up.z), silu_mul_of(gate.w, up.w)};
  }
};

struct Gegelu {
  static __device__ __forceinline__ F32x4 of(const float* x, u32 row, u32 at, u32 out, float limit) {
    F32x4 low = load4(x + (u64)row * 2 * out, 2 * at, 2 * out);
    F32x4 high = load4(x + (u64)row * 2 * out, 2 * at + VALUES, 2 * out);
    return {gegelu_of(low.x, low.y, limit), gegelu_of(low.z, low.w, limit), gegelu_of(high.x, high.y, limit), gegelu_of(high.z, high.w, limit)};
  }
};

struct QuickGelu {
  static __device__ __forceinline__ F32x4 of(const float* x, u32 row, u32 at, u32 out, float) {
    return each(load4(x + (u64)row * out, at, out), quick_gelu_of);
  }
};

struct Gelu {
  static __device__ __forceinline__ F32x4 of(const float* x, u32 row, u32 at, u32 out, float) {
    return each(load4(x + (u64)row * out, at, out), gelu_of);
  }
};

// Of zeros, all of these are zero: the columns that rows are padded with.
#define VALUES_KERNEL(NAME, VALUE, TO)                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                               \
  NAME(const float* x, void* values, Head* heads, u32 cols, u32 stride, i32 zero, float limit) {                  \
    after_previous();                                                                                             \
    u32 row = blockIdx.x, at = (blockIdx.y * blockDim.x + threadIdx.x) * VALUES;                                  \
    TO::put(Output{values, heads, cols, stride, zero}, row, at, VALUE::of(x, row, at, cols, limit));              \
  }
#define VALUES_KERNELS(NAME, VALUE)            \
  VALUES_KERNEL(NAME##_f32, VALUE, Floats)     \
  VALUES_KERNEL(NAME##_bf16, VALUE, Rounded)   \
  VALUES_KERNEL(NAME##_i8, VALUE, Quantized)

VALUES_KERNELS(input, Same)
VALUES_KERNELS(silu_mul, SiluMul)
VALUES_KERNELS(gegelu, Gegelu)
VALUES_KERNELS(quick_gelu, QuickGelu)
VALUES_KERNELS(gelu, Gelu)

// ---- norms -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float sum4(F32x4 v) { return (v.x + v.y) + (v.z + v.w); }

struct Rms {
  // The mean that is taken off: none.
  static __device__ __forceinline__ float center(const float*, u32, float*) { return 0; }
  static __device__ __forceinline__ float scaled(float x, float, float inverse, float weight, float) { return x * inverse * weight; }
};

struct Layer {
  static __device__ __forceinline__ float center(const float* row, u32 cols, float parts[WARP]) {
    float sum = 0;
    for (u32 at = threadIdx.x * VALUES; at < cols; at += blockDim.x * VALUES) sum += sum4(load4(row, at, cols));
    return block_sum(sum, parts) / (float)cols;
  }
  static __device__ __forceinline__ float scaled(float x, float mean, float inverse, float weight, float bias) {
    return (x - mean) * inverse * weight + bias;
  }
};

// The norm of x + branch, or of x where there is none; the sum goes to `sum_to`, which may be x, or nowhere. A block
// has a row, and each thread its columns of it: what it keeps in shared memory only it reads.
template <class Norm, class To>
__device__ __forceinline__ void
sum_norm(const float* x, const float* branch, float* sum_to, const float* weight, const float* bias, float eps, Output out) {
  DYN_SHARED(float, row);  // [cols]
  __shared__ float parts[WARP];
  u32 cols = out.cols;
  u64 own = (u64)blockIdx.x * cols;
  // Weights have been driven out of the second cache since the last token: they come while the kernel before ends.
  let_next_begin();
  F32x4 early[2] = {load4(weight, threadIdx.x * VALUES, cols), {0, 0, 0, 0}};
  if (bias) early[1] = load4(bias, threadIdx.x * VALUES, cols);
  await_previous();
  for (u32 at = threadIdx.x * VALUES; at < cols; at += blockDim.x * VALUES) {
    F32x4 v = load4(x + own, at, cols);
    if (branch) {
      F32x4 b = load4(branch + own, at, cols);
      v = {v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w};
    }
    if (sum_to) store4(sum_to + own, at, cols, v);
    store4(row, at, cols, v);
  }
  float mean = Norm::center(row, cols, parts);
  float sum = 0;
  for (u32 at = threadIdx.x * VALUES; at < cols; at += blockDim.x * VALUES) {
    F32x4 v = each(load4(row, at, cols), [&](float v) { return (v - mean) * (v - mean); });
    // Columns past the end are not values.
    if (at + 1 >= cols) v.y = 0;
    if (at + 2 >= cols) v.z = 0;
    if (at + 3 >= cols) v.w = 0;
    sum += sum4(v);
  }
  float inverse = 1.0f / sqrtf(block_sum(sum, parts) / (float)cols + eps);
  // All threads of a warp as long as one has columns: they meet in put.
  for (u32 first = 0; first < out.stride; first += blockDim.x * VALUES) {
    u32 at = first + threadIdx.x * VALUES;
    F32x4 v = load4(row, at, cols), w = early[0], b = early[1];
    if (first > 0) {
      w = load4(weight, at, cols);
      if (bias) b = load4(bias, at, cols);
    }
    // Columns past the end are zeros whatever the mean is.
    v.x = at + 0 < cols ? Norm::scaled(v.x, mean, inverse, w.x, b.x) : 0;
    v.y = at + 1 < cols ? Norm::scaled(v.y, mean, inverse, w.y, b.y) : 0;
    v.z = at + 2 < cols ? Norm::scaled(v.z, mean, inverse, w.z, b.z) : 0;
    v.w = at + 3 < cols ? Norm::scaled(v.w, mean, inverse, w.w, b.w) : 0;
    To::put(out, blockIdx.x, at, v);
  }
}

#define NORM_KERNEL(NAME, NORM, TO)                                                                                    \
  extern "C" __global__ void __launch_bounds__(1024)                                                                   \
  NAME(const float* x, const float* branch, float* sum, const float* weight, const float* bias, float eps,             \
       void* values, Head* heads, u32 cols, u32 stride, i32 zero) {                                                    \
    sum_norm<NORM, TO>(x, branch, sum, weight, bias, eps, Output{values, heads, cols, stride, zero});                  \
  }
#define NORM_KERNELS(NAME, NORM)             \
  NORM_KERNEL(NAME##_f32, NORM, Floats)      \
  NORM_KERNEL(NAME##_bf16, NORM, Rounded)    \
  NORM_KERNEL(NAME##_i8, NORM, Quantized)

NORM_KERNELS(rms_norm, Rms)
NORM_KERNELS(layer_norm, Layer)

// ---- rows of a table ---------------------------------------------------------------------------------------

// Columns at .. at + 4 of a row of a table [rows, cols]; rows of floats are `stride` long.
struct TableF32 {
  static __device__ __forceinline__ F32x4 of(const void* table, u32 row, u32 at, u32 cols, u32 stride) {
    const float* values = static_cast<const float*>(table) + (u64)row * stride;
    return columns(at, cols, [&](u32 i) { return values[i]; });
  }
};

struct TableF16 {
  static __device__ __forceinline__ F32x4 of(const void* table, u32 row, u32 at, u32 cols, u32 stride) {
    const u16* values = static_cast<const u16*>(table) + (u64)row * stride;
    return columns(at, cols, [&](u32 i) { return f16_to_f32(values[i]); });
  }
};

struct TableBf16 {
  static __device__ __forceinline__ F32x4 of(const void* table, u32 row, u32 at, u32 cols, u32 stride) {
    const u16* values = static_cast<const u16*>(table) + (u64)row * stride;
    return columns(at, cols, [&](u32 i) { return bf16_to_f32(values[i]); });
  }
};

// Panels of 16 rows, in the order of `quant/src/packed.rs`: four neighbouring columns of a row are four
// neighbouring bytes of a line.
template <u32 LINES>
struct TablePacked {
  static __device__ __forceinline__ F32x4 of(const void* table, u32 row, u32 at, u32 cols, u32) {
    const u32 ROWS = 16, LINE = 64;
    if (at >= cols) return {0, 0, 0, 0};
    u32 blocks = (cols + BLOCK - 1) / BLOCK, r = row % ROWS;
    u32 pair_bytes = (1 + 2 * LINES) * LINE, b = at / BLOCK, g = at % BLOCK / 4;
    u64 panel_bytes = (u64)((blocks + 1) / 2 + blocks * LINES) * LINE;
    const u8* pair = static_cast<const u8*>(table) + row / ROWS * panel_bytes + (u64)(b / 2) * pair_bytes;
    float scale = f16_to_f32(reinterpret_cast<const u16*>(pair)[b % 2 * ROWS + r]);
    const u8* quants = pair + (1 + b % 2 * LINES + g % LINES) * LINE + r * 4;
    u32 four = *reinterpret_cast<const u32*>(quants);
    i32 zero = 128;
    if (LINES == 4) {
      four = (g < LINES ? four : four >> 4) & 0x0F0F0F0Fu;
      zero = 8;
    }
    auto value = [&](u32 i) { return (float)((i32)(four >> 8 * i & 0xFFu) - zero) * scale; };
    return {value(0), value(1), value(2), value(3)};
  }
};

// An id that is no row becomes NaNs.
#define EMBED_KERNEL(NAME, TABLE)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                               \
  NAME(const u32* ids, const void* table, float* x, u32 rows, u32 cols, u32 stride, float multiplier) {           \
    after_previous();                                                                                             \
    u32 at = (blockIdx.y * blockDim.x + threadIdx.x) * VALUES, id = ids[blockIdx.x];                              \
    float nan = __uint_as_float(0x7FC00000u);                                                                     \
    F32x4 v = {nan, nan, nan, nan};                                                                               \
    if (id < rows) v = TABLE::of(table, id, at, cols, stride);                                                    \
    if (multiplier != 1.0f) v = each(v, [&](float v) { return v * multiplier; });                                 \
    store4(x + (u64)blockIdx.x * cols, at, cols, v);                                                              \
  }

EMBED_KERNEL(embed_f32, TableF32)
EMBED_KERNEL(embed_f16, TableF16)
EMBED_KERNEL(embed_bf16, TableBf16)
EMBED_KERNEL(embed_q4, TablePacked<4>)
EMBED_KERNEL(embed_q8, TablePacked<8>)

// ---- logits ---------------------------------------------------------------------------------------------

// Divides, and makes those of unused ids the lowest float. One thread a logit.
extern "C" __global__ void __launch_bounds__(256)
finish_logits(float* logits,      // [rows, vocab]
              const u32* unused,  // [ranges, 2]: first and end
              u32 vocab, float divisor, u32 ranges) {
  after_previous();
  u32 id = blockIdx.y * blockDim.x + threadIdx.x;
  if (id >= vocab) return;
  float* own = logits + (u64)blockIdx.x * vocab + id;
  float v = *own / divisor;
  for (u32 i = 0; i < ranges; i++)
    if (id >= unused[2 * i] && id < unused[2 * i + 1]) v = -3.40282347e38f;
  *own = v;
}
