// Rotation and storing of keys and values, and attention, on the device: for prompts one kernel after the
// other, for passes of a few tokens in one.
//
// Maths   queries and keys are rotated, see `rotate`; then
//         o = sum over j of softmax_j(scale * <q, k_j>) v_j over the keys j that q may see
//
//         Positions are divided in blocks of 256, and those in steps of 32. Within a block
//           s_j  = scale * <q, k_j>                      the scores of a step
//           M    = max(m, max over j of s_j)             m: the largest score of the block so far
//           l   <- l * exp(m - M) + sum over j of exp(s_j - M)
//           a   <- a * exp(m - M) + sum over j of exp(s_j - M) v_j,      then m <- M
//         and the blocks, from the first to the last, are merged alike:
//           l   <- l * exp(m - M) + l_b * exp(m_b - M)   with M = max(m, m_b), and so for a
//         at the end o = a / l.                         (Milakov & Gimelshein 2018; Dao 2022)
//
// Order   A step's sums start at zero and are then added to the block's. So eight warps can take the
//         eight steps of a block at once, each knowing no more of the others than their maxima, and
//         several thread blocks the blocks: added in order it is what one warp walking through all of
//         them computes. *Decode* (`attend_decode_*`) does the first, *prompts* (`attend_prompt_*`) and
//         the encoder's attention without a mask (`attend_full_*`) the second, all with the same
//         functions, so that a query's result is the same bit for bit, whatever is computed beside it,
//         however the prompt was cut, however large the cache and the grid are. A step of which a query
//         sees nothing changes nothing (its factor is exp(0) = 1, its sums are 0): masked steps are
//         left out, and neither loaded nor computed.
//
// Layout  queries, keys and values of a token in a row of `qkv`, f32, in either order of heads;
//         cache    keys [kv_heads][context][head_dim], values alike; f16 or f32
//
// Tiles   of 16 queries a warp. Two kinds of arithmetic (structs `Half` and `Float`):
//         Half     f16 keys and values: tensor cores, m16n8k16 with f32 sums. Queries and weights are
//                  rounded to f16. Nothing is transposed anywhere, because the three axes that a
//                  product leaves open are permuted instead:
//                  1. elements of a head: a lane's B registers of two products of 16 elements are 8
//                     neighbours of one key, a single 16-byte load; the queries lie alike
//                  2. keys of a step: the score a lane gets is the weight it supplies to the next
//                     product; which key that is, `Half::key` chooses such that both reads of shared
//                     memory, 8 keys x 64 bytes and 4 values x 64 bytes, touch every bank equally often
//                  3. columns of the result: a lane reads 4 neighbouring elements of 8 values and
//                     supplies one of them to each of 4 products, whose column is "its lane's"
//         Float    f32 keys and values: lanes are keys for the scores, columns for the values; plain
//                  fmaf from the first element to the last, expf
//
// Work    4 operations a query, visible key and element
//         Decode rotates and stores too: a launch less in every layer. Each thread block rotates the up to
//         16 + 2 * 8 rows it needs, half a KiB each, from the second cache while `first` is on its way. What
//         takes no memory, the divisions that tell a thread its row, comes before the wait for the launch
//         before, and keys are on their way when the barrier behind the rotation is reached.
//         It leaves its results as the next matrix takes them, where a block of 32 columns is of one
//         head: the warp that has them quantizes them, and a launch less lies before the matrix
// Limit   decode: the bytes of keys and values, read once for the whole group of query heads (up to 16
//         rows: queries of a group times tokens). A warp has its 32 keys and values, 16 KiB at
//         head_dim 128, in flight at once, a multiprocessor with 8 of them 128 KiB; 4.3 TB/s and 700 ns
//         ask for 23 KiB. Of the tensor cores a tenth is used: 16 rows are computed where 1 is needed.
//         Partial results of a row are 1/64 of the keys and values of its block in f16, written and read.
//         prompts: 128 queries share a step through shared memory. At head_dim 128 a warp's step is 64
//         products and 16 KiB of reads, 128 clocks of a multiprocessor's shared memory; the products
//         take 128 on an A100 and 64 on an H100, so at most half of the latter's peak. Beside them are
//         about 300 instructions for masks, exponentials and factors. What the blocks before gave waits in
//         `y`, not in 64 registers: a read and a write of 8 KiB a warp for every 8 steps.
// Exact   Half: with u = 2^-11, a weight is off by u relatively and a score by u * sum |q_e k_e| * scale
//         (rounded q), the rest is f32; ex2.approx is good to 2^-22, far below. Float: f32 throughout.
//         The tensor cores of different generations add a product's 16 terms in different orders: bits
//         agree on one GPU, not between GPUs.
// Masked  keys and values after the last token are never used, whatever the memory holds. Inside a
//         pass, an infinite or NaN value reaches the queries that share a step of 32 positions with it
//         even if they come before it (0 * inf); a model that computes one is lost anyhow.
//
// Registers  (at most, of sm_80, 89 and 90; no spills; 256 threads a block)
//         head_dim       32    64    96   128     f32
//         decode         93   128   173   223     160
//         prompt         96   135   176   174     246
//         full           80   128   174   174     251
#include "common.cuh"

constexpr u32 BLOCK = 256;   // positions merged to one partial result; crate::mask::BLOCK
constexpr u32 STEP = 32;     // positions whose weights are computed together
constexpr u32 WARPS = 8;     // of a thread block: BLOCK / STEP
constexpr u32 TILE = 16;     // queries of a warp
constexpr u32 THREADS = WARPS * 32;
constexpr u32 NO_WINDOW = 0xFFFFFFFFu;
#define NOTHING __uint_as_float(0xFF800000u)    // -inf: the maximum of no scores

// ---------------------------------------------------------------- heads and masks

// Where the heads are in a row of the projections.
struct Heads {
  u32 heads, kv_heads, head_dim;
  u32 grouped;             // 0: all queries, keys, values; 1: for each KV head its queries, key, value

  __device__ u32 group() const { return heads / kv_heads; }
  __device__ u32 columns() const { return (heads + 2 * kv_heads) * head_dim; }
  __device__ u32 query(u32 head) const {
    return (grouped ? head + 2 * (head / group()) : head) * head_dim;
  }
  __device__ u32 key(u32 kv_head) const {
    return (grouped ? kv_head * (group() + 2) + group() : heads + kv_head) * head_dim;
  }
  __device__ u32 value(u32 kv_head) const {
    return key(kv_head) + (grouped ? 1 : kv_heads) * head_dim;
  }
};

// Positions `begin .. end`.
struct Range {
  u32 begin, end;
};

// Which keys at or before it a query sees: crate::mask::Mask.
struct Mask {
  u32 window;              // at most so many of them, itself included
  u32 block;               // or whole blocks of so many positions, 16 to 256; 0: no blocks
  u32 local_blocks, vert_stride, head_step;

  __device__ static Mask none() { return {NO_WINDOW, 0, 0, 0, 0}; }

  // Of the 16 keys from `key` on (a multiple of 16), those that a query sees are in this range.
  __device__ Range seen(u32 head, u32 position, u32 key) const {
    if (block == 0) {
      return {position + 1 > window ? position + 1 - window : 0, position + 1};
    }
    u32 query_block = position / block, key_block = key / block;
    bool sees = key_block <= query_block
      && (query_block - key_block < local_blocks
        || (key_block + head * head_step + 1) % vert_stride == 0);
    return {0, sees ? position + 1 : 0};
  }

  // The first step from `step` on of which some query of a head sees something; `position` is the
  // first query's. Steps after the last query are for the caller to leave out.
  __device__ u32 next(u32 step, u32 head, u32 position) const {
    if (block == 0) {
      u32 begin = position + 1 > window ? position + 1 - window : 0;
      return step > begin / STEP ? step : begin / STEP;
    }
    u32 from = step * STEP / block, query_block = position / block;
    u32 local = query_block + 1 > local_blocks ? query_block + 1 - local_blocks : 0;
    local = local > from ? local : from;
    u32 phase = (from + head * head_step + 1) % vert_stride;
    u32 kept = phase ? from + vert_stride - phase : from;
    u32 first = (kept < local ? kept : local) * block / STEP;
    return step > first ? step : first;
  }
};

// Keys and values of one KV head: row `i` at `i * stride` after the first; `count` of them are there.
template <class T>
struct Stored {
  const T* keys;
  const T* values;
  u32 first_key, first_value, stride, count;

  __device__ const T* key(u32 row, u32 column) const {
    return keys + (first_key + row * stride + column);
  }
  __device__ const T* value(u32 row, u32 column) const {
    return values + (first_value + row * stride + column);
  }
};

// Keys and values of a pass's own tokens in shared memory, `[count][head_dim]`: row 0 is of position `first`.
template <class T>
struct Fresh {
  const T* keys;
  const T* values;
  u32 first, count;
};

// ---------------------------------------------------------------- arithmetic of a tile

__device__ __forceinline__ u32 lane() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp() { return threadIdx.x / 32; }

__device__ __forceinline__ u32 pack(float low, float high) {
  return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16;
}

// The elements of `a` and `b` at `j` of two f16 each.
__device__ __forceinline__ u32 pick(u32 a, u32 b, u32 j) {
  return j % 2 ? a >> 16 | (b & 0xFFFF0000u) : (a & 0xFFFFu) | b << 16;
}

__device__ __forceinline__ void load4(const float* from, float x[4]) {
  F32x4 four = *reinterpret_cast<const F32x4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
__device__ __forceinline__ void store4(const float x[4], float* to) {
  *reinterpret_cast<F32x4*>(to) = {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void store4(const float x[4], u16* to) {
  *reinterpret_cast<U32x2*>(to) = {pack(x[0], x[1]), pack(x[2], x[3])};
}

// A pair of elements of a head, half of it apart; the arithmetic is `cpu::rope`'s, bit for bit:
//   y[i] = x[i] cos[i] - x[i + h] sin[i],   y[i + h] = x[i + h] cos[i] + x[i] sin[i],   h = head_dim / 2
__device__ __forceinline__ void rotate(float& low, float& high, float cos, float sin) {
  float rotated = low * cos - high * sin;
  high = high * cos + low * sin;
  low = rotated;
}

// What 16 queries gave so far. A lane holds ROWS rows of the tile, of each COLS columns; `max` and
// `sum` are the same in all lanes that hold a row.
template <class P>
struct State {
  float max[P::ROWS], sum[P::ROWS], acc[P::ROWS][P::COLS];

  __device__ void clear() {
    #pragma unroll
    for (u32 r = 0; r < P::ROWS; r++) {
      max[r] = NOTHING, sum[r] = 0;
      #pragma unroll
      for (u32 c = 0; c < P::COLS; c++) acc[r][c] = 0;
    }
  }
};

// The factors that take two partial results to their common maximum.
struct Factors {
  float max, old, added;
};

// Where nothing was seen yet, the maximum that is subtracted is 0 and exponentials are of -inf.
__device__ __forceinline__ float reference(float max) { return max == NOTHING ? 0 : max; }

template <class P>
__device__ __forceinline__ Factors join(float old, float added) {
  float max = fmaxf(old, added), from = reference(max);
  return {max, P::exp(old - from), P::exp(added - from)};
}

// Whether a partial result is of no keys at all.
__device__ __forceinline__ bool saw_nothing(float max, float sum) { return max == NOTHING && sum == 0; }

// a / l, and never -0: a step that was left out and one that added 0 are the same.
__device__ __forceinline__ float inverse(float sum) { return sum == 0 ? 0 : 1 / sum; }
__device__ __forceinline__ float finish(float acc, float inverse) { return acc * inverse + 0.0f; }

// 16 queries on f16 keys and values, by tensor cores; `D`: head_dim in whole 32s. The lane
// `4 g + t` holds rows g and g + 8. Scores are in units of ln 2.
template <u32 D>
struct Half {
  static constexpr u32 ROWS = 2, KEYS = 8, COLS = D / 4;
  static constexpr u32 WIDTH = D;                  // of a head, in whole 32s
  static constexpr u32 CHUNKS = D / 32;
  static constexpr u32 PITCH = D + 16;             // of a row in shared memory: 32 bytes more

  u32 q[CHUNKS][2][4];

  __device__ static float exp(float x) { return exp2_approx(x); }
  __device__ static u32 row(u32 r) { return lane() / 4 + 8 * r; }
  __device__ static bool writes() { return lane() % 4 == 0; }
  // Which key of the step score `i` of a lane is of; see "Tiles".
  __device__ static u32 key(u32 i) {
    u32 t = lane() % 4;
    return 8 * (i / 2) + (i % 2 ? 4 + (t + 2) % 4 : t);
  }
  // The column of the head that `acc[..][c]` is.
  __device__ static u32 column(u32 c) { return 32 * (c / 8) + 8 * (lane() % 4) + c % 8; }
  // A lane's columns of a row in memory.
  __device__ static void get(const float* row, float x[COLS], u32 head_dim) {
    #pragma unroll
    for (u32 c = 0; c < COLS; c += 4) {
      F32x4 four = {0, 0, 0, 0};
      if (column(c) < head_dim) four = *reinterpret_cast<const F32x4*>(row + column(c));
      x[c] = four.x, x[c + 1] = four.y, x[c + 2] = four.z, x[c + 3] = four.w;
    }
  }
  __device__ static void put(float* row, const float x[COLS], u32 head_dim) {
    #pragma unroll
    for (u32 c = 0; c < COLS; c += 4) {
      F32x4 four = {x[c], x[c + 1], x[c + 2], x[c + 3]};
      if (column(c) < head_dim) *reinterpret_cast<F32x4*>(row + column(c)) = four;
    }
  }
  // The key that a lane reads for the scores of keys `8 i ..`.
  __device__ static u32 key_row(u32 i) {
    u32 g = lane() / 4;
    return 8 * i + (g % 2 ? 4 + (g / 2 + 2) % 4 : g / 2);
  }
  // The elements from `key_column` on of that: 8 for two products.
  __device__ static u32 key_column(u32 chunk) { return 32 * chunk + 8 * (lane() % 4); }
  // The four values that a lane reads for the 16 keys `16 u ..`.
  __device__ static u32 value_row(u32 u, u32 i) { return key(4 * u + i); }
  // And the elements from this one on of them: 4 for four products.
  __device__ static u32 value_column(u32 chunk) { return 32 * chunk + 4 * (lane() / 4); }

  // Largest and sum over the lanes of a row.
  __device__ static float largest(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
  }
  __device__ static float total(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
  }

  // What queries are multiplied by before they are rounded.
  __device__ static float factor(float scale) { return scale * 1.44269504f; }    // log2(e)

  // Queries at `from + at(row(0)) ..`; rows from `count` on are none. `head_dim <= D`, a multiple of 8.
  template <class F>
  __device__ void load(const float* from, F at, u32 count, u32 head_dim, float scale) {
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      #pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) {
        float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (row(r) < count && key_column(c) < head_dim) {
          #pragma unroll
          for (u32 e = 0; e < 8; e++) x[e] = from[at(row(r)) + key_column(c) + e] * factor(scale);
        }
        #pragma unroll
        for (u32 i = 0; i < 4; i++) q[c][i / 2][r + 2 * (i % 2)] = pack(x[2 * i], x[2 * i + 1]);
      }
    }
  }

  // The same from rows one after the other, multiplied and rounded.
  __device__ void take(const u16* from, u32 count, u32 head_dim, float) {
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      #pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) {
        U32x4 x = {0, 0, 0, 0};
        if (row(r) < count && key_column(c) < head_dim) {
          x = *reinterpret_cast<const U32x4*>(from + row(r) * head_dim + key_column(c));
        }
        q[c][0][r] = x.x, q[c][0][r + 2] = x.y;
        q[c][1][r] = x.z, q[c][1][r + 2] = x.w;
      }
    }
  }

  // `step.key(i, chunk)`: 8 elements of key `key_row(i)`.
  template <class Step>
  __device__ void scores(float s[ROWS][KEYS], const Step& step) const {
    #pragma unroll
    for (u32 i = 0; i < STEP / 8; i++) {
      float d[4] = {0, 0, 0, 0};
      #pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) {
        U32x4 k = step.key(i, c);
        u32 first[2] = {k.x, k.y}, second[2] = {k.z, k.w};
        mma_f16(d, q[c][0], first);
        mma_f16(d, q[c][1], second);
      }
      s[0][2 * i] = d[0], s[0][2 * i + 1] = d[1];
      s[1][2 * i] = d[2], s[1][2 * i + 1] = d[3];
    }
  }

  // acc <- acc * factor + weights x values; `step.value(chunk, u, i)`: of value `value_row(u, i)` the 4
  // elements from `value_column(chunk)` on.
  template <class Step>
  __device__ void weigh(
    State<Half>& state, const float factor[ROWS], const float s[ROWS][KEYS], const Step& step
  ) const {
    u32 weights[2][4];
    #pragma unroll
    for (u32 u = 0; u < 2; u++) {
      #pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const float* two = &s[i % 2][4 * u + 2 * (i / 2)];
        weights[u][i] = pack(two[0], two[1]);
      }
    }
    #pragma unroll
    for (u32 c = 0; c < CHUNKS; c++) {
      U32x2 v[2][4];
      #pragma unroll
      for (u32 u = 0; u < 2; u++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) v[u][i] = step.value(c, u, i);
      }
      #pragma unroll
      for (u32 j = 0; j < 4; j++) {
        float d[4] = {0, 0, 0, 0};
        #pragma unroll
        for (u32 u = 0; u < 2; u++) {
          u32 w[4];
          #pragma unroll
          for (u32 i = 0; i < 4; i++) w[i] = j < 2 ? v[u][i].x : v[u][i].y;
          u32 b[2] = {pick(w[0], w[1], j), pick(w[2], w[3], j)};
          mma_f16(d, weights[u], b);
        }
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
          float& acc = state.acc[i / 2][8 * c + 4 * (i % 2) + j];
          acc = fmaf(acc, factor[i / 2], d[i]);
        }
      }
    }
  }

  // One step's keys and values in a warp's registers, straight from memory; those that are not
  // there are 0.
  struct Fetched {
    U32x4 keys[STEP / 8][CHUNKS];
    U32x2 values[CHUNKS][2][4];

    __device__ void read_keys(const Stored<u16>& stored, u32 first, u32 head_dim) {
      #pragma unroll
      for (u32 i = 0; i < STEP / 8; i++) {
        u32 at = first + key_row(i);
        #pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
          keys[i][c] = {0, 0, 0, 0};
          if (at < stored.count && key_column(c) < head_dim) {
            keys[i][c] = *reinterpret_cast<const U32x4*>(stored.key(at, key_column(c)));
          }
        }
      }
    }
    __device__ void read_values(const Stored<u16>& stored, u32 first, u32 head_dim) {
      #pragma unroll
      for (u32 u = 0; u < 2; u++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
          u32 at = first + value_row(u, i);
          #pragma unroll
          for (u32 c = 0; c < CHUNKS; c++) {
            values[c][u][i] = {0, 0};
            if (at < stored.count && value_column(c) < head_dim) {
              values[c][u][i] = *reinterpret_cast<const U32x2*>(stored.value(at, value_column(c)));
            }
          }
        }
      }
    }
    // Those of the pass's own tokens.
    __device__ void add_keys(const Fresh<u16>& fresh, u32 first, u32 head_dim) {
      if (first + STEP <= fresh.first) return;
      #pragma unroll
      for (u32 i = 0; i < STEP / 8; i++) {
        u32 at = first + key_row(i) - fresh.first;   // before the first: a very large one
        #pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
          if (at < fresh.count && key_column(c) < head_dim) {
            keys[i][c] = *reinterpret_cast<const U32x4*>(fresh.keys + at * head_dim + key_column(c));
          }
        }
      }
    }
    __device__ void add_values(const Fresh<u16>& fresh, u32 first, u32 head_dim) {
      if (first + STEP <= fresh.first) return;
      #pragma unroll
      for (u32 u = 0; u < 2; u++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
          u32 at = first + value_row(u, i) - fresh.first;
          #pragma unroll
          for (u32 c = 0; c < CHUNKS; c++) {
            if (at < fresh.count && value_column(c) < head_dim) {
              values[c][u][i] =
                *reinterpret_cast<const U32x2*>(fresh.values + at * head_dim + value_column(c));
            }
          }
        }
      }
    }
    __device__ U32x4 key(u32 i, u32 chunk) const { return keys[i][chunk]; }
    __device__ U32x2 value(u32 chunk, u32 u, u32 i) const { return values[chunk][u][i]; }
  };
  using Joined = Fetched;

  // One step's keys and values in shared memory, for all warps.
  struct Staged {
    alignas(16) u16 keys[STEP][PITCH];
    alignas(16) u16 values[STEP][PITCH];

    // Starts to copy the 32 keys and values from `first` on.
    __device__ void copy(const Stored<u16>& stored, u32 first, u32 head_dim) {
      for (u32 i = threadIdx.x; i < 2 * STEP * (D / 8); i += THREADS) {
        u32 row = i / (D / 8) % STEP, column = i % (D / 8) * 8;
        bool key = i < STEP * (D / 8);
        u16* to = key ? &keys[row][column] : &values[row][column];
        if (first + row < stored.count && column < head_dim) {
          cp_async16(to, key ? stored.key(first + row, column) : stored.value(first + row, column));
        } else {
          *reinterpret_cast<U32x4*>(to) = {0, 0, 0, 0};
        }
      }
    }
    // The same from f32, rounded on the way.
    __device__ void copy(const Stored<float>& stored, u32 first, u32 head_dim) {
      for (u32 i = threadIdx.x; i < 2 * STEP * (D / 4); i += THREADS) {
        u32 row = i / (D / 4) % STEP, column = i % (D / 4) * 4;
        bool key = i < STEP * (D / 4);
        U32x2 x = {0, 0};
        if (first + row < stored.count && column < head_dim) {
          const float* from =
            key ? stored.key(first + row, column) : stored.value(first + row, column);
          F32x4 f = *reinterpret_cast<const F32x4*>(from);
          x = {pack(f.x, f.y), pack(f.z, f.w)};
        }
        *reinterpret_cast<U32x2*>(key ? &keys[row][column] : &values[row][column]) = x;
      }
    }
    __device__ U32x4 key(u32 i, u32 chunk) const {
      return *reinterpret_cast<const U32x4*>(&keys[key_row(i)][key_column(chunk)]);
    }
    __device__ U32x2 value(u32 chunk, u32 u, u32 i) const {
      return *reinterpret_cast<const U32x2*>(&values[value_row(u, i)][value_column(chunk)]);
    }
  };

  // Two of them: one is copied while all warps work with the other.
  struct Buffer {
    Staged staged[2];
  };
  template <class T>
  __device__ static void
  copy(Buffer& to, u32 stage, const Stored<T>& stored, u32 first, u32 head_dim) {
    to.staged[stage].copy(stored, first, head_dim);
  }
  template <class T>
  __device__ static const Staged& step(const Buffer& from, u32 stage, const Stored<T>&, u32) {
    return from.staged[stage];
  }
};

// 16 queries on f32 keys and values. All lanes hold all rows; of the columns, lane `l` holds `l + 32 c`.
struct Float {
  static constexpr u32 ROWS = TILE, KEYS = 1, COLS = 4;
  static constexpr u32 WIDTH = 32 * COLS;
  static constexpr u32 TOGETHER = 4;               // rows that share a read of the values

  const float* queries;
  u32 q[ROWS];                                     // where each is in there
  u32 count, head_dim;
  float scale;

  __device__ static float exp(float x) { return expf(x); }
  __device__ static u32 row(u32 r) { return r; }
  __device__ static bool writes() { return lane() == 0; }
  __device__ static u32 key(u32) { return lane(); }
  __device__ static u32 column(u32 c) { return lane() + 32 * c; }
  __device__ static void get(const float* row, float x[COLS], u32 head_dim) {
    #pragma unroll
    for (u32 c = 0; c < COLS; c++) x[c] = column(c) < head_dim ? row[column(c)] : 0;
  }
  __device__ static void put(float* row, const float x[COLS], u32 head_dim) {
    #pragma unroll
    for (u32 c = 0; c < COLS; c++) {
      if (column(c) < head_dim) row[column(c)] = x[c];
    }
  }
  __device__ static float largest(float x) { return warp_max(x); }
  __device__ static float total(float x) { return warp_sum(x); }

  template <class F>
  __device__ void load(const float* from, F at, u32 rows, u32 columns, float factor) {
    queries = from, count = rows, head_dim = columns, scale = factor;
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) q[r] = at(r);
  }
  __device__ static float factor(float) { return 1; }
  __device__ void take(const float* from, u32 rows, u32 columns, float factor) {
    load(from, [&](u32 row) { return row * columns; }, rows, columns, factor);
  }

  // One step's keys and values, where they are: `count` of the 32 are there.
  struct Fetched {
    const float* keys;
    const float* values;
    u32 stride;
    u32 count;

    __device__ void read(const Stored<float>& stored, u32 first) {
      keys = stored.key(first, 0);
      values = stored.value(first, 0);
      stride = stored.stride;
      count = first < stored.count ? stored.count - first : 0;
    }
    __device__ const float* key(u32 row) const { return keys + row * stride; }
    __device__ float value(u32 row, u32 column) const { return values[row * stride + column]; }
  };

  // The same with those of the pass's own tokens behind them.
  struct Joined : Fetched {
    const float* fresh_keys;
    const float* fresh_values;
    u32 cached, skipped;     // `row` is in the cache below `cached`, or fresh row `row + skipped`, which may wrap

    __device__ void read_keys(const Stored<float>& stored, u32 first, u32) { read(stored, first); }
    __device__ void read_values(const Stored<float>&, u32, u32) {}
    __device__ void add_keys(const Fresh<float>& fresh, u32 first, u32) {
      fresh_keys = fresh.keys, fresh_values = fresh.values;
      cached = count, skipped = first - fresh.first;
      u32 end = fresh.first + fresh.count;
      count = first < end ? end - first : 0;
    }
    __device__ void add_values(const Fresh<float>&, u32, u32) {}
    __device__ const float* key(u32 row) const {
      return row < cached ? keys + row * stride : fresh_keys + (row + skipped) * stride;
    }
    __device__ float value(u32 row, u32 column) const {
      return (row < cached ? values + row * stride : fresh_values + (row + skipped) * stride)[column];
    }
  };

  template <class Step>
  __device__ void scores(float s[ROWS][KEYS], const Step& step) const {
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) s[r][0] = 0;
    if (lane() < step.count) {
      const float* key = step.key(lane());
      for (u32 e = 0; e < head_dim; e += 4) {
        F32x4 k = *reinterpret_cast<const F32x4*>(key + e);
        #pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
          if (r < count) {
            F32x4 x = *reinterpret_cast<const F32x4*>(queries + q[r] + e);
            float d = fmaf(x.x, k.x, s[r][0]);
            d = fmaf(x.y, k.y, d);
            d = fmaf(x.z, k.z, d);
            s[r][0] = fmaf(x.w, k.w, d);
          }
        }
      }
    }
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) s[r][0] *= scale;
  }

  template <class Step>
  __device__ void weigh(
    State<Float>& state, const float factor[ROWS], const float s[ROWS][KEYS], const Step& step
  ) const {
    __shared__ float weights[WARPS][STEP][TILE];
    #pragma unroll
    for (u32 r = 0; r < ROWS; r++) weights[warp()][lane()][r] = s[r][0];
    __syncwarp();
    u32 keys = step.count < STEP ? step.count : STEP;
    #pragma unroll
    for (u32 first = 0; first < ROWS; first += TOGETHER) {
      if (first >= count) continue;
      float d[TOGETHER][COLS] = {};
      for (u32 j = 0; j < keys; j++) {
        float v[COLS];
        #pragma unroll
        for (u32 c = 0; c < COLS; c++) v[c] = column(c) < head_dim ? step.value(j, column(c)) : 0;
        #pragma unroll
        for (u32 r = 0; r < TOGETHER; r++) {
          float weight = weights[warp()][j][first + r];
          #pragma unroll
          for (u32 c = 0; c < COLS; c++) d[r][c] = fmaf(weight, v[c], d[r][c]);
        }
      }
      #pragma unroll
      for (u32 r = 0; r < TOGETHER; r++) {
        #pragma unroll
        for (u32 c = 0; c < COLS; c++) {
          float& acc = state.acc[first + r][c];
          acc = fmaf(acc, factor[first + r], d[r][c]);
        }
      }
    }
    __syncwarp();
  }

  // Nothing goes through shared memory: the first cache serves the warps of a block.
  struct Buffer {};
  __device__ static void copy(Buffer&, u32, const Stored<float>&, u32, u32) {}
  __device__ static Fetched step(const Buffer&, u32, const Stored<float>& stored, u32 first) {
    Fetched step;
    step.read(stored, first);
    return step;
  }
};

// ---------------------------------------------------------------- the softmax of a step

// Which query a row of a tile is.
struct Query {
  u32 head, position;
};

// Scores of keys that a query does not see become -inf. `query(row)` tells who a row is.
template <class P, class F>
__device__ __forceinline__ void hide(float s[P::ROWS][P::KEYS], const Mask& mask, u32 first, F query) {
  #pragma unroll
  for (u32 r = 0; r < P::ROWS; r++) {
    Query q = query(P::row(r));
    Range low = mask.seen(q.head, q.position, first);
    Range high = mask.block && mask.block < STEP ? mask.seen(q.head, q.position, first + 16) : low;
    #pragma unroll
    for (u32 i = 0; i < P::KEYS; i++) {
      u32 key = first + P::key(i);
      Range seen = P::key(i) < 16 ? low : high;
      if (key < seen.begin || key >= seen.end) s[r][i] = NOTHING;
    }
  }
}

template <class P>
__device__ __forceinline__ void maxima(const float s[P::ROWS][P::KEYS], float max[P::ROWS]) {
  #pragma unroll
  for (u32 r = 0; r < P::ROWS; r++) {
    max[r] = s[r][0];
    #pragma unroll
    for (u32 i = 1; i < P::KEYS; i++) max[r] = fmaxf(max[r], s[r][i]);
    max[r] = P::largest(max[r]);
  }
}

// Scores become weights relative to `max`, the largest of this step and those before it in its block;
// gives their sums.
template <class P>
__device__ __forceinline__ void
weights(float s[P::ROWS][P::KEYS], const float max[P::ROWS], float sum[P::ROWS]) {
  #pragma unroll
  for (u32 r = 0; r < P::ROWS; r++) {
    sum[r] = 0;
    #pragma unroll
    for (u32 i = 0; i < P::KEYS; i++) {
      s[r][i] = P::exp(s[r][i] - reference(max[r]));
      sum[r] += s[r][i];
    }
    sum[r] = P::total(sum[r]);
  }
}

// ---------------------------------------------------------------- prompts

// One thread block: 128 neighbouring queries of a head, 16 a warp, walk through all steps that one of
// them sees. `tile`: which 128 of the sequence's `tokens`; the first token is at position `first`, or
// all are at `position` (attention without a mask). The first result of the head is at
// `y[y_at]`.
template <class P, class T>
__device__ __forceinline__ void attend_tile(
  const float* queries, u32 query_stride, Stored<T> stored, u32 tokens, u32 tile, u32 head,
  u32 head_dim, u32 first, bool causal, Mask mask, float scale, float* y, u32 y_at, u32 y_stride
) {
  __shared__ typename P::Buffer buffer;
  u32 begin = tile * WARPS * TILE;                 // token of the block's first row
  u32 mine = begin + warp() * TILE;                // and of the warp's
  u32 rows = mine < tokens ? (tokens - mine < TILE ? tokens - mine : TILE) : 0;
  u32 last = begin + WARPS * TILE < tokens ? begin + WARPS * TILE : tokens;
  auto position = [&](u32 token) { return causal ? first + token : stored.count - 1; };
  auto query = [&](u32 row) { return Query{head, position(mine + row)}; };

  P p;
  p.load(queries, [&](u32 row) { return (mine + row) * query_stride; }, rows, head_dim, scale);
  State<P> block;
  block.clear();
  float max_of_all[P::ROWS], sum_of_all[P::ROWS];    // of the blocks before; `y` has what they gave
  #pragma unroll
  for (u32 r = 0; r < P::ROWS; r++) max_of_all[r] = NOTHING, sum_of_all[r] = 0;
  // Merges the block into those before it. The same in `attend_split`, element by element.
  auto merge = [&](bool last) {
    #pragma unroll
    for (u32 r = 0; r < P::ROWS; r++) {
      if (P::row(r) >= rows) continue;
      float* row = y + (y_at + (mine + P::row(r)) * y_stride);
      float acc[P::COLS] = {};
      if (!saw_nothing(max_of_all[r], sum_of_all[r])) P::get(row, acc, head_dim);
      Factors f = join<P>(max_of_all[r], block.max[r]);
      max_of_all[r] = f.max;
      sum_of_all[r] = fmaf(sum_of_all[r], f.old, block.sum[r] * f.added);
      float factor = inverse(sum_of_all[r]);
      #pragma unroll
      for (u32 c = 0; c < P::COLS; c++) {
        acc[c] = fmaf(acc[c], f.old, block.acc[r][c] * f.added);
        if (last) acc[c] = finish(acc[c], factor);
      }
      P::put(row, acc, head_dim);
    }
    block.clear();
  };

  u32 end = position(last - 1) / STEP + 1, stage = 0;
  u32 at = mask.next(0, head, position(begin));
  P::copy(buffer, stage, stored, at * STEP, head_dim);
  cp_async_commit();
  while (at < end) {
    u32 following = mask.next(at + 1, head, position(begin));
    cp_async_wait<0>();
    __syncthreads();    // the step is there, and nobody works with the other stage any more
    if (following < end) P::copy(buffer, stage ^ 1, stored, following * STEP, head_dim);
    cp_async_commit();
    // Whether one of the warp's queries sees something of the step.
    if (rows && at * STEP <= position(mine + rows - 1) && mask.next(at, head, position(mine)) == at) {
      const auto& step = P::step(buffer, stage, stored, at * STEP);
      float s[P::ROWS][P::KEYS], max[P::ROWS], sum[P::ROWS], factor[P::ROWS];
      p.scores(s, step);
      hide<P>(s, mask, at * STEP, query);
      maxima<P>(s, max);
      #pragma unroll
      for (u32 r = 0; r < P::ROWS; r++) {
        max[r] = fmaxf(block.max[r], max[r]);
        factor[r] = P::exp(block.max[r] - reference(max[r]));
      }
      weights<P>(s, max, sum);
      #pragma unroll
      for (u32 r = 0; r < P::ROWS; r++) {
        block.sum[r] = fmaf(block.sum[r], factor[r], sum[r]);
        block.max[r] = max[r];
      }
      p.weigh(block, factor, s, step);
    }
    if (following < end && following / WARPS != at / WARPS) merge(false);
    at = following;
    stage ^= 1;
  }
  merge(true);
}

// ---------------------------------------------------------------- decode

// One pass of attention over a layer of the cache.
template <class T>
struct Layer {
  const float* qkv;
  const T* keys;
  const T* values;
  const u32* first;        // position of the first token
  u32 tokens;
  Heads heads;
  u32 context;             // positions allocated
  Mask mask;
  float scale;

  // Keys and values of a KV head, up to the last token of the pass.
  __device__ Stored<T> stored(u32 kv_head) const {
    u32 from = kv_head * context * heads.head_dim, end = *first + tokens;
    return {keys, values, from, from, heads.head_dim, end < context ? end : context};
  }
};

// What a pass of decoding brings with it.
template <class T>
struct Brought {
  const float* cos;        // [tokens][head_dim / 2]
  const float* sin;
  T* keys;                 // the layer's
  T* values;
};

// Partial results of the blocks of 256, for up to 16 rows of a KV head each.
struct Partials {
  float* acc;              // [blocks][heads * tokens][head_dim]
  float* max;              // [blocks][heads * tokens]
  float* sum;              // [blocks][heads * tokens]
  u32* done;               // [kv_heads][tiles]: thread blocks with positions that are through; 0 between launches
};

// One thread block: blocks `split`, `split + splits` ... of 256 positions, for 16 queries of a KV head
// (tokens times heads of the group), a step a warp. The last thread block to be through merges all.
//
// Queries are rotated here, and so are the keys of the pass's own tokens, which come to the cache by this
// launch. No thread block could know when another has written them. So each rotates all that it may need, its
// queries and the keys and values of all tokens of the pass, to shared memory (16 rows and twice up to 8), and
// of the cache reads what is before the first of them. One thread block of a KV head also writes them to
// the cache, where this launch reads nothing from `first` on: there is no address that one thread writes and
// one of another thread block reads or writes, but the partial results, which have their fence.
template <class P, class T>
__device__ __forceinline__ void
attend_split(const Layer<T>& layer, const Brought<T>& brought, Partials out, Results y) {
  __shared__ float max_of[WARPS][TILE], sum_of[WARPS][TILE];
  __shared__ u32 is_last;
  DYN_SHARED(float, acc_of);                       // [WARPS][rows][head_dim]
  let_next_begin();
  const Heads& heads = layer.heads;
  u32 kv_head = blockIdx.y, tile = blockIdx.z, head_dim = heads.head_dim, group = heads.group();
  u32 tokens = layer.tokens, all = tokens * group;
  u32 rows = all - tile * TILE < TILE ? all - tile * TILE : TILE, first_head = kv_head * group;
  auto token = [&](u32 row) { return (tile * TILE + row) / group; };
  auto head = [&](u32 row) { return first_head + (tile * TILE + row) % group; };

  // Rows of `qkv` as this thread block needs them: queries, multiplied; keys, values.
  T* own = reinterpret_cast<T*>(acc_of + WARPS * rows * head_dim);    // [rows + 2 * tokens][head_dim]
  constexpr u32 PAIRS = 4, LANES = 128 / 2 / PAIRS;    // of a thread; threads of a row
  struct Place {
    u32 token, column;
  };
  auto place = [&](u32 i) {
    if (i < rows) return Place{token(i), heads.query(head(i))};
    i -= rows;
    return i < tokens ? Place{i, heads.key(kv_head)} : Place{i - tokens, heads.value(kv_head)};
  };
  u32 half = head_dim / 2, pair = threadIdx.x % LANES * PAIRS;
  u32 earliest = token(0), latest = token(rows - 1);
  Place from = place(threadIdx.x / LANES);

  await_previous();                                // what can be known without memory is known
  u32 first = *layer.first;
  Stored<T> cached = layer.stored(kv_head);
  u32 count = cached.count;
  if (first < count) cached.count = first;
  for (u32 i = threadIdx.x / LANES; i < rows + 2 * tokens; i += THREADS / LANES, from = place(i)) {
    if (pair >= half) continue;
    const float* x = layer.qkv + (from.token * heads.columns() + from.column + pair);
    float low[PAIRS], high[PAIRS];
    load4(x, low), load4(x + half, high);
    if (i < rows + tokens) {
      float cos[PAIRS], sin[PAIRS];
      load4(brought.cos + from.token * half + pair, cos);
      load4(brought.sin + from.token * half + pair, sin);
      #pragma unroll
      for (u32 j = 0; j < PAIRS; j++) rotate(low[j], high[j], cos[j], sin[j]);
    }
    if (i < rows) {
      #pragma unroll
      for (u32 j = 0; j < PAIRS; j++) low[j] *= P::factor(layer.scale), high[j] *= P::factor(layer.scale);
    }
    T* to = own + i * head_dim + pair;
    store4(low, to), store4(high, to + half);
    if (i >= rows && blockIdx.x == 0 && tile == 0 && first + from.token < layer.context) {
      to = (i < rows + tokens ? brought.keys : brought.values)
        + ((kv_head * layer.context + first + from.token) * head_dim + pair);
      store4(low, to), store4(high, to + half);
    }
  }
  Fresh<T> fresh = {
    own + rows * head_dim, own + (rows + tokens) * head_dim, first, first < count ? count - first : 0
  };
  auto query = [&](u32 row) { return Query{head(row), first + token(row)}; };

  // The blocks that somebody sees, and where their partial results go.
  u32 begin = layer.mask.block ? 0 : layer.mask.next(0, 0, first + earliest) / WARPS;
  u32 end = (count - 1) / BLOCK + 1;
  bool alone = end - begin == 1;
  // More may be allocated than there is: the thread blocks without positions are through.
  u32 splits = min(gridDim.x, end - begin);
  if (blockIdx.x >= splits) return;
  u32 partials = heads.heads * tokens, partial = first_head * tokens + tile * TILE;
  auto put = [&](u32 row, u32 column, float v) {
    y.put(token(row), head(row) * head_dim + column, v);
  };

  for (u32 b = begin + blockIdx.x; b < end; b += gridDim.x) {
    // The step of this warp, if one of the queries sees something of it.
    u32 at = b * WARPS + warp();
    bool live = false;
    for (u32 h = 0; h < group; h++) {
      live = live || layer.mask.next(at, first_head + h, first + earliest) == at;
    }
    live = live && at * STEP <= first + latest;

    P p;
    typename P::Joined step;
    float s[P::ROWS][P::KEYS], max[P::ROWS], sum[P::ROWS], factor[P::ROWS];
    #pragma unroll
    for (u32 r = 0; r < P::ROWS; r++) max[r] = NOTHING, sum[r] = 0, factor[r] = 0;
    Stored<T> seen = cached;
    if (!live) seen.count = 0;                     // not a branch: values kept over one cost registers
    step.read_keys(seen, at * STEP, head_dim);
    // The pass's own rows are there, and nobody needs the maxima of the block before any more.
    __syncthreads();
    if (live) {
      p.take(own, rows, head_dim, layer.scale);
      step.read_values(cached, at * STEP, head_dim);
      step.add_keys(fresh, at * STEP, head_dim);
      p.scores(s, step);
      hide<P>(s, layer.mask, at * STEP, query);
      maxima<P>(s, max);
    }
    #pragma unroll
    for (u32 r = 0; r < P::ROWS; r++) {
      if (P::writes()) max_of[warp()][P::row(r)] = max[r];
    }
    __syncthreads();
    if (live) {
      #pragma unroll
      for (u32 r = 0; r < P::ROWS; r++) {
        #pragma unroll
        for (u32 w = 0; w < WARPS - 1; w++) {
          float before = max_of[w][P::row(r)];     // all reads at once
          if (w < warp()) max[r] = fmaxf(max[r], before);
        }
      }
      weights<P>(s, max, sum);
      step.add_values(fresh, at * STEP, head_dim);
      State<P> own;
      own.clear();
      p.weigh(own, factor, s, step);
      #pragma unroll
      for (u32 r = 0; r < P::ROWS; r++) {
        if (P::row(r) >= rows) continue;
        P::put(acc_of + (warp() * rows + P::row(r)) * head_dim, own.acc[r], head_dim);
      }
    }
    #pragma unroll
    for (u32 r = 0; r < P::ROWS; r++) {
      if (P::writes()) sum_of[warp()][P::row(r)] = sum[r];
    }
    __syncthreads();
    // What `attend_tile` does with one step after the other, an element a thread.
    for (u32 i = threadIdx.x; i < rows * P::WIDTH; i += THREADS) {
      u32 row = i / P::WIDTH, column = i % P::WIDTH;
      if (column >= head_dim) continue;
      float max_w[WARPS], sum_w[WARPS], acc_w[WARPS];
      #pragma unroll
      for (u32 w = 0; w < WARPS; w++) {
        max_w[w] = max_of[w][row], sum_w[w] = sum_of[w][row];
        acc_w[w] = acc_of[(w * rows + row) * head_dim + column];    // anything, where nothing was seen
      }
      float max = NOTHING, sum = 0, acc = 0;
      #pragma unroll
      for (u32 w = 0; w < WARPS; w++) {
        bool saw = !saw_nothing(max_w[w], sum_w[w]);
        float now = fmaxf(max, max_w[w]), factor = P::exp(max - reference(now));
        max = saw ? now : max;
        sum = saw ? fmaf(sum, factor, sum_w[w]) : sum;
        acc = saw ? fmaf(acc, factor, acc_w[w]) : acc;
      }
      if (alone) {
        put(row, column, finish(acc, inverse(sum)));
        continue;
      }
      u64 to = (u64)b * partials + partial + row;
      out.acc[to * head_dim + column] = acc;
      if (column == 0) out.max[to] = max, out.sum[to] = sum;
    }
  }
  if (alone) return;

  __threadfence();        // this block's partial results, before it says that it is through
  __syncthreads();
  u32* done = out.done + kv_head * gridDim.z + tile;
  if (threadIdx.x == 0) is_last = atomicAdd(done, 1u) == splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *done = 0;
  for (u32 i = threadIdx.x; i < rows * P::WIDTH; i += THREADS) {
    u32 row = i / P::WIDTH, column = i % P::WIDTH;
    if (column >= head_dim) continue;
    float max = NOTHING, sum = 0, acc = 0;
    constexpr u32 FLIGHT = 8;                    // reads under way at once
    for (u32 b = begin; b < end; b += FLIGHT) {
      float max_b[FLIGHT], sum_b[FLIGHT], acc_b[FLIGHT];
      #pragma unroll
      for (u32 j = 0; j < FLIGHT; j++) {
        u64 from = (u64)(b + j < end ? b + j : b) * partials + partial + row;
        max_b[j] = out.max[from], sum_b[j] = out.sum[from];
        acc_b[j] = out.acc[from * head_dim + column];
      }
      #pragma unroll
      for (u32 j = 0; j < FLIGHT; j++) {
        if (b + j >= end || saw_nothing(max_b[j], sum_b[j])) continue;
        Factors f = join<P>(max, max_b[j]);
        max = f.max;
        sum = fmaf(sum, f.old, sum_b[j] * f.added);
        acc = fmaf(acc, f.old, acc_b[j] * f.added);
      }
    }
    put(row, column, finish(acc, inverse(sum)));
  }
}

// ---------------------------------------------------------------- kernels

#define LAYER(T)                                                                                   \
  const float *qkv, T *keys, T *values, const u32 *first, u32 tokens, u32 heads,                 \
    u32 kv_heads, u32 head_dim, u32 grouped, u32 context, u32 window, u32 block,               \
    u32 local_blocks, u32 vert_stride, u32 head_step, float scale
#define THE_LAYER                                                                                  \
  {qkv, keys, values, first, tokens, {heads, kv_heads, head_dim, grouped}, context,              \
  {window, block, local_blocks, vert_stride, head_step}, scale}

template <class P, class T>
__device__ __forceinline__ void attend_prompt(const Layer<T>& layer, float* y) {
  const Heads& heads = layer.heads;
  u32 head = blockIdx.y;
  attend_tile<P, T>(
    layer.qkv + heads.query(head), heads.columns(), layer.stored(head / heads.group()),
    layer.tokens, gridDim.x - 1 - blockIdx.x,    // the longest first
    head, heads.head_dim, *layer.first, true, layer.mask, layer.scale,
    y, head * heads.head_dim, heads.heads * heads.head_dim
  );
}

// Every query of a sequence with all its keys, which are beside it in `qkv`.
template <class P>
__device__ __forceinline__ void
attend_full(const float* qkv, u32 tokens, const Heads& heads, float scale, float* y) {
  u32 head = blockIdx.y, kv_head = head / heads.group();
  u32 rows = blockIdx.z * tokens, columns = heads.columns(), queries = heads.heads * heads.head_dim;
  Stored<float> stored = {
    qkv, qkv, rows * columns + heads.key(kv_head), rows * columns + heads.value(kv_head), columns, tokens
  };
  attend_tile<P, float>(
    qkv + (rows * columns + heads.query(head)), columns, stored, tokens, blockIdx.x, head,
    heads.head_dim, 0, false, Mask::none(), scale, y, rows * queries + head * heads.head_dim, queries
  );
}

#define ATTEND(NAME, P, T)                                                                         \
  /* grid [splits, kv_heads, tiles of 16 rows] */                                                \
  extern "C" __global__ void __launch_bounds__(THREADS) attend_decode_##NAME(                    \
    LAYER(T), const float* cos, const float* sin, float* acc, float* max, float* sum,          \
    u32* done, void* y, Head* y_heads, u32 form, i32 zero                                      \
  ) {                                                                                            \
    Layer<T> layer = THE_LAYER;                                                                \
    attend_split<P, T>(                                                                        \
      layer, {cos, sin, keys, values}, {acc, max, sum, done}, {y, y_heads, heads * head_dim, form, zero}       \
    );                                                                                         \
  }                                                                                              \
  /* grid [tiles of 128 tokens, heads] */                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) attend_prompt_##NAME(                    \
    LAYER(const T), float* y                                                                   \
  ) {                                                                                            \
    after_previous();                                                                          \
    Layer<T> layer = THE_LAYER;                                                                \
    attend_prompt<P, T>(layer, y);                                                             \
  }                                                                                              \
  /* grid [tiles of 128 tokens, heads, sequences] */                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) attend_full_##NAME(                      \
    const float* qkv, u32 tokens, u32 heads, u32 kv_heads, u32 head_dim, u32 grouped,          \
    float scale, float* y                                                                      \
  ) {                                                                                            \
    after_previous();                                                                          \
    attend_full<P>(qkv, tokens, {heads, kv_heads, head_dim, grouped}, scale, y);               \
  }

ATTEND(f16_32, Half<32>, u16)
ATTEND(f16_64, Half<64>, u16)
ATTEND(f16_96, Half<96>, u16)
ATTEND(f16_128, Half<128>, u16)
ATTEND(f32, Float, float)

// ---------------------------------------------------------------- rotation and storing

__device__ __forceinline__ void store(float x, float* to) { *to = x; }
__device__ __forceinline__ void store(float x, u16* to) { *to = f32_to_f16(x); }

// Before a prompt: queries are rotated where they are; keys, rotated, and values go to positions `first ..` of
// the cache. A thread a pair of a head of a token, values too. Positions outside the cache are left out.
template <class T>
__device__ __forceinline__ void rope_and_store(
  float* qkv, const float* cos, const float* sin, T* keys, T* values, const u32* first, u32 tokens,
  const Heads& heads, u32 context
) {
  u32 half = heads.head_dim / 2, slots = heads.heads + 2 * heads.kv_heads;
  u32 at = blockIdx.x * blockDim.x + threadIdx.x, i = at % half, slot = at / half % slots;
  u32 token = at / half / slots;
  if (token >= tokens) return;
  u32 kv_head = (slot - heads.heads) % heads.kv_heads;
  bool is_query = slot < heads.heads, is_key = slot < heads.heads + heads.kv_heads;
  float* x = qkv + (u64)token * heads.columns()
    + (is_query ? heads.query(slot) : is_key ? heads.key(kv_head) : heads.value(kv_head)) + i;
  float low = x[0], high = x[half];
  if (is_key) {           // or a query
    rotate(low, high, cos[(u64)token * half + i], sin[(u64)token * half + i]);
  }
  if (is_query) {
    x[0] = low, x[half] = high;
  } else if (*first + token < context) {
    T* to = (is_key ? keys : values)
      + ((u64)kv_head * context + *first + token) * heads.head_dim + i;
    store(low, to);
    store(high, to + half);
  }
}

#define ROPE(NAME, T)                                                                              \
  /* grid: 256 pairs a block */                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS) rope_and_store_##NAME(                   \
    float* qkv, const float* cos, const float* sin, T* keys, T* values, const u32* first,      \
    u32 tokens, u32 heads, u32 kv_heads, u32 head_dim, u32 grouped, u32 context                \
  ) {                                                                                            \
    after_previous();                                                                          \
    rope_and_store<T>(                                                                         \
      qkv, cos, sin, keys, values, first, tokens, {heads, kv_heads, head_dim, grouped},      \
      context                                                                                \
    );                                                                                         \
  }

ROPE(f16, u16)
ROPE(f32, float)
