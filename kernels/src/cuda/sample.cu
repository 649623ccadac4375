// Choosing tokens from logits.
//
// Maths   candidates  the `count` greatest logits, of equal ones the lowest tokens first, and sum over all of
//                     exp(logit - greatest)
//         argmax      the first of them
// Layout  a row of results: refused, sum, 0, 0, `count` tokens, `count` logits; of `argmax` the sum is +inf
//
//         Value and token make one number of 64 bits that is ordered as tokens are chosen: the bits of
//         the float, complemented where it is negative and with the sign set where it is not, above the
//         complement of the token. No two are equal, so "the greatest" is never in doubt and the order in
//         which threads come to them does not show.
// Tricks  1. A thread takes every 1024th logit. The `count`-th greatest of the threads' maxima is below
//            `count` logits at least, and above nearly all others: of a shuffled vocabulary some 300 reach
//            it for 256, which are sorted in shared memory. No histogram, whose counts would be those of
//            a few exponents, waited for by all.
//         2. If more than 1024 reach it, the bound is bisected until they fit.
// Work    the logits twice, by one multiprocessor: 128 KiB for 32,064 tokens, from the second cache
// Limit   latency: one block of 1024 threads, 2 passes of 32 loads, two sorts of 55 steps. Not 1 % of a
//         token's time, and the copy to the host is of 2 KiB instead of 128.
// Exact   tokens, logits and their order; of the sum, mass_error in sample.rs
#include "common.cuh"

constexpr u32 THREADS = 1024;
constexpr u32 NONE = 0xFFFFFFFFu;    // no token

// -0 and 0 are equal logits: adding 0 joins them.
__device__ __forceinline__ u64 rank(float logit, u32 token) {
  u32 bits = __float_as_uint(logit + 0.0f);
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return (u64)bits << 32 | ~token;
}

__device__ __forceinline__ u32 token_of(u64 rank) { return ~(u32)rank; }

__device__ __forceinline__ float logit_of(u64 rank) {
  u32 bits = (u32)(rank >> 32);
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// The largest over the threads of a block.
__device__ __forceinline__ u64 block_max(u64 v, u64 parts[WARP]) {
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) v = max(v, __shfl_xor_sync(ALL_LANES, v, apart));
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = v;
  __syncthreads();
  v = parts[threadIdx.x % WARP];
  for (u32 apart = WARP / 2; apart > 0; apart /= 2) v = max(v, __shfl_xor_sync(ALL_LANES, v, apart));
  __syncthreads();
  return v;
}

// The greatest of this thread's logits; `refused` becomes the lowest token that is NaN or +inf.
__device__ __forceinline__ u64 greatest(const float* logits, u32 vocab, u32& refused) {
  u64 best = 0;
  for (u32 token = threadIdx.x; token < vocab; token += THREADS) {
    float logit = logits[token];
    if (!(logit < __uint_as_float(0x7F800000u)) && refused == NONE) refused = token;
    best = max(best, rank(logit, token));
  }
  return best;
}

// The lowest token over the threads of a block.
__device__ __forceinline__ u32 lowest(u32 token, u64 parts[WARP]) {
  return ~(u32)block_max(~token, parts);
}

// One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) argmax(
    const float* logits,    // [rows, vocab]
    u32 vocab,
    u32* into               // [rows, 6]: a row of results
) {
  after_previous();
  __shared__ u64 parts[WARP];
  into += (u64)blockIdx.x * 6;
  u32 bad = NONE;
  u64 best = block_max(greatest(logits + (u64)blockIdx.x * vocab, vocab, bad), parts);
  bad = lowest(bad, parts);
  if (threadIdx.x) return;
  into[0] = bad, into[1] = 0x7F800000u, into[2] = into[3] = 0;
  into[4] = token_of(best), into[5] = __float_as_uint(logit_of(best));
}

// Greatest first (Batcher's bitonic sort).
__device__ __forceinline__ void sort(u64 ranks[THREADS]) {
  u32 own = threadIdx.x;
  __syncthreads();
  for (u32 size = 2; size <= THREADS; size *= 2) {
    for (u32 apart = size / 2; apart > 0; apart /= 2) {
      u32 other = own ^ apart;
      if (own < other) {    // one of the two reads, and changes, both
        u64 a = ranks[own], b = ranks[other];
        bool falls = (own & size) == 0;
        if ((a < b) == falls) ranks[own] = b, ranks[other] = a;
      }
      __syncthreads();
    }
  }
}

// One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) candidates(
    const float* logits,    // [rows, vocab]
    u32 vocab, u32 count,
    u32* into               // [rows, 4 + 2 count]: rows of results
) {
  after_previous();
  __shared__ u64 ranks[THREADS], parts[WARP];
  __shared__ float sums[WARP];
  __shared__ u32 reached;
  logits += (u64)blockIdx.x * vocab;
  into += (u64)blockIdx.x * (4 + 2 * count);

  u32 bad = NONE;
  u64 own = greatest(logits, vocab, bad);
  bad = lowest(bad, parts);
  u64 best = block_max(own, parts);
  ranks[threadIdx.x] = own;
  sort(ranks);
  // `count` logits or more reach the bound; bisected, if need be, between one that too many reach and one
  // that fewer than `count` do.
  u64 bound = ranks[count - 1], low = bound, high = best;

  float greatest_logit = logit_of(best), sum = 0;
  for (u32 token = threadIdx.x; token < vocab; token += THREADS) sum += expf(logits[token] - greatest_logit);
  sum = block_sum(sum, sums);

  for (;;) {
    __syncthreads();    // all have read what is cleared now
    if (threadIdx.x == 0) reached = 0;
    ranks[threadIdx.x] = 0;
    __syncthreads();
    for (u32 token = threadIdx.x; token < vocab; token += THREADS) {
      u64 candidate = rank(logits[token], token);
      if (candidate < bound) continue;
      u32 at = atomicAdd(&reached, 1u);
      if (at < THREADS) ranks[at] = candidate;
    }
    __syncthreads();
    if (reached >= count && reached <= THREADS) break;
    (reached > THREADS ? low : high) = bound;
    bound = low + (high - low) / 2;
  }
  sort(ranks);
  if (threadIdx.x < count) {
    into[4 + threadIdx.x] = token_of(ranks[threadIdx.x]);
    into[4 + count + threadIdx.x] = __float_as_uint(logit_of(ranks[threadIdx.x]));
  }
  if (threadIdx.x == 0) into[0] = bad, into[1] = __float_as_uint(sum), into[2] = into[3] = 0;
}
