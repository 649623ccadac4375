// A mixture of experts: the router, the grouping of tokens by expert, and the weighted sum.
// The products of the experts are those of `linear.cu`, which read the groups made here.
//
// Maths   router   sparsemixer, twice, the second time without the first pick: m the largest score left, e its
//                  expert; kept are those left with (m - s[j]) / max(|s[j]|, m) <= 2 jitter;
//                  weight = 1 / sum over kept of exp(s[j] - m)
//         groups   pick i (token i / 2) gets place offset[e] + (picks of the same expert before it)
//         sum      y[t] = weight_1 * output[place_1] + weight_2 * output[place_2]
// Layout  scores [tokens][experts]; picks, weights and places [tokens][2]; sources [2 tokens], the token of
//         each place; tiles [most][expert, first place, count, 0], the empty ones last; loads [experts + 1],
//         to which the tokens of each expert are added and, to the last, how many experts have any
// Work    one thread block, so that a layer's routing is one launch: a warp per token to pick, then a warp per
//         expert, which runs over all picks twice
// Limit   latency: some microseconds for a token. About 4000 instructions of a warp for 32 tokens; 4096 tokens
//         keep one multiprocessor busy for tens of microseconds, a hundredth of what their experts take
// Exact   picks and comparisons as in float on the CPU. exp in float: a weight is within some units in the last
//         place. Groups are counted, not raced for: the same each time

#include "common.cuh"

constexpr u32 PICKS = 2;
constexpr u32 NONE = ~0u;

// A score and whose it is.
struct Best {
  float score;
  u32 expert;
};

__device__ __forceinline__ bool beats(const Best& a, const Best& b) {
  return a.score > b.score || (a.score == b.score && a.expert < b.expert);
}

// The expert with the largest score but `taken`, and its weight: for all lanes of a warp.
//
// A score that is no number is never larger than another, so it is picked only when it comes first, as
// when the scores are compared one after the other.
__device__ __forceinline__ Best pick(const float* scores, u32 experts, u32 taken, float jitter, u32 lane) {
  Best best = {-__uint_as_float(0x7F800000u), NONE};
  for (u32 j = lane; j < experts; j += WARP) {
    Best other = {scores[j], j};
    if (j != taken && beats(other, best)) best = other;
  }
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
    Best other = {__shfl_xor_sync(ALL_LANES, best.score, distance), __shfl_xor_sync(ALL_LANES, best.expert, distance)};
    if (beats(other, best)) best = other;
  }
  u32 first = taken == 0 ? 1 : 0;
  if (scores[first] != scores[first]) best = {scores[first], first};

  float sum = 0.0f;
  for (u32 j = lane; j < experts; j += WARP) {
    float score = scores[j];
    // Where there is no distance and nothing to divide by (0 / 0) the score is near.
    bool far = (best.score - score) / fmaxf(fabsf(score), best.score) > 2.0f * jitter;
    if (j != taken && !far) sum += expf(score - best.score);
  }
  return {1.0f / warp_sum(sum), best.expert};
}

// One block. Dynamic shared memory: two counts an expert, and two more.
extern "C" __global__ void __launch_bounds__(512) route(const float* scores, u32 tokens, u32 experts, float jitter, u32 tile, u32 most_tiles, u32* picks,
         float* weights, u32* places, u32* sources, u32* tiles, u64* loads) {
  after_previous();
  DYN_SHARED(u32, offsets);  // [experts + 1]: first the counts, then where each group begins
  u32* first_tiles = offsets + experts + 1;  // [experts + 1]
  u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;

  for (u32 t = warp; t < tokens; t += warps) {
    const float* row = scores + u64(t) * experts;
    Best a = pick(row, experts, NONE, jitter, lane);
    Best b = pick(row, experts, a.expert, jitter, lane);
    if (lane < PICKS) {
      picks[t * PICKS + lane] = lane == 0 ? a.expert : b.expert;
      weights[t * PICKS + lane] = lane == 0 ? a.score : b.score;
    }
  }
  __syncthreads();

  u32 all = tokens * PICKS;
  for (u32 e = warp; e < experts; e += warps) {
    u32 count = 0;
    for (u32 first = 0; first < all; first += WARP) {
      u32 i = first + lane;
      count += __popc(__ballot_sync(ALL_LANES, i < all && picks[i] == e));
    }
    if (lane == 0) offsets[e] = count;
  }
  __syncthreads();

  if (thread == 0) {
    u32 offset = 0, tile_count = 0, loaded = 0;
    for (u32 e = 0; e < experts; e++) {
      u32 count = offsets[e];
      loaded += count > 0;
      offsets[e] = offset;
      first_tiles[e] = tile_count;
      offset += count;
      tile_count += (count + tile - 1) / tile;
    }
    offsets[experts] = offset;
    first_tiles[experts] = tile_count;
    loads[experts] += loaded;
  }
  __syncthreads();

  for (u32 e = warp; e < experts; e += warps) {
    u32 place = offsets[e];
    for (u32 first = 0; first < all; first += WARP) {
      u32 i = first + lane;
      bool own = i < all && picks[i] == e;
      u32 owners = __ballot_sync(ALL_LANES, own);
      if (own) {
        u32 at = place + __popc(owners & ((1u << lane) - 1));
        places[i] = at;
        sources[at] = i / PICKS;
      }
      place += __popc(owners);
    }
    u32 end = offsets[e + 1];
    // The one block of a layer, and passes follow one another: nobody else adds.
    if (lane == 0) loads[e] += end - offsets[e];
    for (u32 k = lane; k < first_tiles[e + 1] - first_tiles[e]; k += WARP) {
      u32* to = tiles + (first_tiles[e] + k) * 4;
      u32 begin = offsets[e] + k * tile;
      to[0] = e;
      to[1] = begin;
      to[2] = min(tile, end - begin);
      to[3] = 0;
    }
  }
  for (u32 k = first_tiles[experts] + thread; k < most_tiles; k += blockDim.x) {
    for (u32 i = 0; i < 4; i++) tiles[k * 4 + i] = 0;
  }
}

// A token (`blockIdx.x`) and as many columns as threads (`blockIdx.y`).
extern "C" __global__ void __launch_bounds__(256) sum_picks(const float* outputs, const u32* places, const float* weights, u32 cols, float* y) {
  after_previous();
  u32 token = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= cols) return;
  float a = outputs[u64(places[token * PICKS]) * cols + column];
  float b = outputs[u64(places[token * PICKS + 1]) * cols + column];
  y[u64(token) * cols + column] = weights[token * PICKS] * a + weights[token * PICKS + 1] * b;
}
