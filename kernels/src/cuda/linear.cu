// Matrix products: rows of activations times weights, alone, side by side, gated, and of experts.
//
// Maths   y[t, r] = bias[r] + sum over K ranges, in order, of (sum over the blocks of the range, in order)
//         packed   block = sw[r, b] * (sx[t, b] * (sum over i of u[r, b, i] * a[t, b, i] - zero * sum a[t, b]))
//         bf16     block = two tensor core products of 16 columns, f32 inside; activations rounded to bf16
//         floats   block = 32 fused multiply-adds in the order of the columns
//         gates    y = up * silu(gate) of two matrices alike; GEGELU of neighbouring rows of one
// Layout  packed weights as in `quant/src/packed.rs`: a panel of 16 rows is pairs of blocks, each
//         | scales [2][16] f16 | quants [2][4 or 8 lines][64] |, of an odd number the last one without the second
//         quants. The others are row-major, every row padded with zeros to whole blocks of 32 columns. Activations likewise `[tokens][blocks][32]`, i8 with a `Head`
//         for each block, or bf16, or f32.
// Exact   a block of packed weights is an integer, scaled by a power of two: exact; all else is f32. The K
//         ranges are a function of the columns alone, and both kernels of a format add the same numbers in
//         the same order, so a result has the same bits for one token and for many, alone or among others.
//
// The order of rows and columns is free to choose. The matrix instruction takes the rows l / 4 and l / 4 + 8
// from lane l; here they are the rows 2 (l / 4) and 2 (l / 4) + 1 of the panel, which lie side by side in a
// line: a lane reads 8 bytes, a warp 256 consecutive ones, and they *are* the fragment. Nothing is shuffled
// and nothing goes through shared memory. Both nibbles of a q4 byte belong to one row and to columns 16
// apart, as the fragment wants them. For bf16 a lane reads 16 bytes of a row, the columns 8 t to 8 t + 7,
// and gives them to two instructions as their columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; activations alike.
// Two neighbouring rows end in one lane, and so does the same row of two panels: every gate is a few
// operations on registers.
//
// The zero point and the scale of a block of activations cost nothing: see `quant/src/activations.rs`. The
// instruction starts from `start` and leaves the bits of a float; taking `magic` off is the product.
//
// Decode  A thread block has up to 8 tokens, the columns of the instruction, and every so many of the panels (of
//         the pairs that a gate needs); a warp has one K range of each. The weights come through a ring in
//         shared memory that is the warp's own (`cp.async`): it copies some steps ahead, from panel to panel
//         without a gap, and begins before the kernel before has ended. Partial sums meet in shared memory.
//         Limit  memory bandwidth. A ring is 6 KiB, of which a step is read while the others are on their way: q4
//                and q8 four of 1.1 KiB, bf16 two of 2. The 16 of a multiprocessor have 64 to 72 KiB under way;
//                at 3 TB/s and 1 us 132 of them need 23 KiB each. They take half of its registers (64 a thread)
//                and of its shared memory. In the other half the blocks of the next kernel fill theirs: up to
//                12 MB of weights are there when its turn comes.
//         Work   of a q4 block of a panel (288 bytes) a warp executes 50 instructions, 16 of them to copy, of a
//                q8 one (544 bytes) 40 to 60. At 3 TB/s and 1.75 GHz a multiprocessor gets 13 bytes a cycle: 22
//                cycles, in which it can issue 88.
//         Before, each block had one panel, 12 to 20 KiB of it in registers on their way, and asked the second
//         cache for the rest before its turn: on an H100 (2.94 TB/s) 9216 x 3072 of q4 took 10.1 us and 16384 x
//         3072 14.6 us, where memory would give them in 5.4 and 9.6; a step of Phi-3.5-mini 1.9 ms, and 1.7 without asking.
// Prompt  A thread block has 8 panels and 64 tokens, 8 warps of 2 panels and 32 tokens; weights and
//         activations come through shared memory, some stages ahead (`cp.async`). Two blocks fit a
//         multiprocessor, for which the 128 registers of a thread are filled. For bf16 it is 128 tokens, 64
//         a warp, and one block: 185 registers.
//         Limit  packed: issuing instructions. Of the 200 that a warp executes a block, 64 are additions and
//                multiply-adds of the 32 sums of a lane, and 8 are matrix instructions of 4096 products:
//                650 products a cycle and multiprocessor, of the 2048 (sm_80) or 4096 (sm_90) that the int8
//                tensor cores could do. bf16: what L2 gives. Shared memory, 6 KiB for 32 instructions at 128
//                bytes a cycle, would do for 1365 products a cycle.
//         Work   from L2 a thread block takes 18 bytes a block and row of q4 and 40 a block and token: with
//                128 rows and 64 tokens 4.9 KB for 262,144 products, 12 bytes a cycle at 650. Of bf16 it is
//                64 bytes a block and row or token, 16 KiB for 524,288 products: if L2 gives a multiprocessor
//                27 bytes a cycle, 860 products, two thirds of what mma.sync reaches on an H100 (about 1300).
//                64 tokens would be 12 KiB for half of them: 580.
//         The figures are counted, in machine code for sm_90. An H100 reached 290 products a cycle in q4 and q8
//         with 2048 tokens, attention and all else counted in: half of what issuing would allow.

#include "common.cuh"

constexpr u32 BLOCK = 32;
constexpr u32 PANEL_ROWS = 16;
constexpr u32 LINE = 64;
// K ranges of an even number of blocks, and the warps of a decoding block.
constexpr u32 RANGES = 8;
constexpr u32 THREADS = 32 * RANGES;
// Slots of a tile of an expert, where it has few and where it has many. The first are the tokens of a decoding
// block; a prompt's has `Format::TOKENS`, all of the second or a part.
constexpr u32 FEW = 8;
constexpr u32 MANY = 128;
// Panels of a prompt's block.
constexpr u32 PANELS = 8;

enum Gate : u32 { NONE, SILU, GEGELU };

// The arguments that all the kernels take.
//
// Up to three matrices of one input, their results side by side; with SILU the gate and the up projection.
// An expert's matrix begins `step` bytes after the one before it; experts have no bias.
#define MATRIX(i) const u8* w##i, const float* bias##i, u32 rows##i, u32 step##i
#define PARAMETERS                                                                                        \
  MATRIX(0), MATRIX(1), MATRIX(2), u32 blocks, u32 range, u32 gate, float limit, const u8* x,             \
    const Head* heads, u32 tokens, const u32* sources, const Tile* tiles, void* y, u32 stride,            \
    Head* y_heads, u32 form, i32 zero
#define PRODUCT                                                                                           \
  Product{{w0, bias0, rows0, step0}, {w1, bias1, rows1, step1}, {w2, bias2, rows2, step2}, blocks,      \
      range, gate, limit, x, heads, tokens, sources, tiles, {y, y_heads, stride, form, zero}}

struct Matrix {
  const u8* weights;
  const float* bias;  // or none
  u32 rows;
  u32 step;
};

// Some slots (rows of the result), all of one expert. A list of them ends with empty ones.
struct Tile {
  u32 expert;
  u32 first;
  u32 count;
  u32 unused;
};

struct Product {
  Matrix first, second, third;
  u32 blocks;          // of 32 columns
  u32 range;           // blocks of a K range
  u32 gate;
  float limit;         // of GEGELU
  const u8* x;         // activations
  const Head* heads;   // their heads, if they are quantized
  u32 tokens;          // rows of the result, where there are no tiles
  const u32* sources;  // the row of `x` that a slot takes, or none: its own
  const Tile* tiles;   // or none: one matrix for all
  Results y;
};

// A panel as a product meets it.
struct Panel {
  const u8* weights;  // of the matrix
  const float* bias;  // of the matrix, or none
  u32 index;          // which panel of the matrix
  u32 rows;           // of the matrix; none: nothing is to be written
  u32 column;         // of the result, for the first row of the matrix
};

__device__ __forceinline__ u32 panels_of(const Matrix& m) { return (m.rows + PANEL_ROWS - 1) / PANEL_ROWS; }

// Panels of all matrices, `N` of them a column.
template <u32 N> __device__ __forceinline__ u32 columns_of(const Product& p) {
  return (panels_of(p.first) + panels_of(p.second) + panels_of(p.third)) / N;
}

// Panel `index` of those of all matrices; with SILU even ones are the gate's, odd ones are up's. Past the
// end it is the last one, with no rows.
__device__ __forceinline__ Panel panel_at(const Product& p, u32 expert, u32 index) {
  u32 n0 = panels_of(p.first), n1 = panels_of(p.second), n2 = panels_of(p.third);
  u32 last = n0 + n1 + n2 - 1;
  u32 i = min(index, last);
  Panel panel = {p.first.weights, p.first.bias, i, p.first.rows, 0};
  u32 step = p.first.step;
  // Values are chosen, not places: the arguments stay where they are.
  bool second = p.gate == SILU ? i % 2 == 1 : i >= n0;
  if (second) {
    panel = {p.second.weights, p.second.bias, i - n0, p.second.rows, p.first.rows};
    step = p.second.step;
  }
  if (p.gate == SILU) {
    panel.index = i / 2;
    panel.column = 0;
  } else if (i >= n0 + n1) {
    panel = {p.third.weights, p.third.bias, i - n0 - n1, p.third.rows, p.first.rows + p.second.rows};
    step = p.third.step;
  }
  panel.weights += u64(expert) * step;
  if (index > last) panel.rows = 0;
  return panel;
}

// The rows of the result that a thread block makes, `size` at most; listed tiles have `whole` at most, of
// which each block has a part.
__device__ __forceinline__ Tile tile_at(const Product& p, u32 index, u32 size, u32 whole) {
  Tile tile = {0, 0, p.tokens, 0};
  u32 skipped = index * size;
  if (p.tiles) {
    tile = p.tiles[skipped / whole];
    skipped %= whole;
  }
  tile.first += skipped;
  tile.count = tile.count > skipped ? min(tile.count - skipped, size) : 0;
  return tile;
}

__device__ __forceinline__ u32 source_of(const Product& p, u32 slot) { return p.sources ? p.sources[slot] : slot; }

__device__ __forceinline__ float with_bias(const Panel& panel, u32 row, float sum) {
  return panel.bias ? sum + panel.bias[row] : sum;
}

__device__ __forceinline__ float silu_mul(float gate, float up) { return up * (gate / (1.0f + expf(-gate))); }

__device__ __forceinline__ float unless_infinite(float v, float clamped) { return fabsf(v) == __uint_as_float(0x7F800000u) ? v : clamped; }

// `kernels/src/cpu/gate.rs`; comparisons that keep a NaN.
__device__ __forceinline__ float gegelu(float a, float b, float limit) {
  a = unless_infinite(a, a > limit ? limit : a);
  b = unless_infinite(b, b > limit ? limit : b < -limit ? -limit : b);
  return a / (1.0f + expf(-1.702f * a)) * (b + 1.0f);
}

// Writes the rows `row` and `row + 1` of the matrix of `panel`, whose sums are `a` and `b`, of one slot.
__device__ __forceinline__ void put_rows(const Product& p, const Panel& panel, u32 slot, u32 row, float a, float b) {
  float* y = p.y.row(slot) + panel.column;
  if (p.gate == GEGELU) {
    if (row < panel.rows) {
      y[row / 2] = gegelu(with_bias(panel, row, a), with_bias(panel, row + 1, b), p.limit);
    }
    return;
  }
  if (row < panel.rows) y[row] = with_bias(panel, row, a);
  if (row + 1 < panel.rows) y[row + 1] = with_bias(panel, row + 1, b);
}

// Row `row` of the gate's panel and up's, whose sums are `a` and `b`, gated; 0 past the last one.
__device__ __forceinline__ float gated(const Panel& gate, const Panel& up, u32 row, float a, float b) {
  return row < gate.rows ? silu_mul(with_bias(gate, row, a), with_bias(up, row, b)) : 0.0f;
}

// Where a lane stands in the fragments: rows 2 g and 2 g + 1 of a panel; token g of those it loads, tokens
// 2 t and 2 t + 1 of those it sums.
struct Lane {
  u32 g, t;
};

__device__ __forceinline__ Lane lane_of(u32 thread) { return {thread % 32 / 4, thread % 4}; }

// A lane's sums of one panel and 8 tokens: [row 2 g, 2 g + 1][token 2 t, 2 t + 1].
struct Sums {
  float at[4];
};

// Four or eight bits a weight: `LINES` is 4 or 8.
template <u32 LINES> struct Packed {
  static constexpr u32 BLOCK_BYTES = LINES * LINE;

  static constexpr u32 SCALES_BYTES = PANEL_ROWS * 2;
  // Two blocks, after the line of their scales.
  static constexpr u32 PAIR_BYTES = LINE + 2 * BLOCK_BYTES;

  // Bytes of some blocks from one with an even number on.
  static __device__ __forceinline__ u64 bytes_of(u32 blocks) { return (blocks + 1) / 2 * LINE + u64(blocks) * BLOCK_BYTES; }

  // Where the pair begins that has block `first`, an even number.
  static __device__ __forceinline__ const u8* pair_at(const Panel& panel, u32 blocks, u32 first) {
    return panel.weights + panel.index * bytes_of(blocks) + u64(first / 2) * PAIR_BYTES;
  }

  // The fragment of a block from a lane's words: rows 2 g and 2 g + 1 of line t, and of line t + 4.
  static __device__ __forceinline__ void unpack(const u32 (&w)[LINES / 2], u32 (&a)[4]) {
    if constexpr (LINES == 4) {
      a[0] = w[0] & 0x0F0F0F0F;
      a[1] = w[1] & 0x0F0F0F0F;
      a[2] = w[0] >> 4 & 0x0F0F0F0F;
      a[3] = w[1] >> 4 & 0x0F0F0F0F;
    } else {
      for (u32 i = 0; i < 4; i++) a[i] = w[i];
    }
  }

  // Adds a block: `low` and `high` are the scales of the two rows, `heads` are of tokens 2 t and 2 t + 1.
  static __device__ __forceinline__ void add(Sums& sums, const u32 (&a)[4], const u32 (&b)[2], const Head (&heads)[2], float low, float high) {
    i32 starts[4] = {heads[0].start, heads[1].start, heads[0].start, heads[1].start}, d[4];
    mma_u8s8(d, a, b, starts);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      float product = __int_as_float(d[i]) - heads[i % 2].magic;
      sums.at[i] = fmaf(product, i < 2 ? low : high, sums.at[i]);
    }
  }

  // The head that has this start: `magic` is 1.5 times a power of two, and `start` at most 128 * 32 * 127 < 2^22
  // units in the last place from it. They have the same exponent, and that is all of `magic`.
  static __device__ __forceinline__ Head head_of(i32 start) {
    return {start, __uint_as_float((u32(start) & 0xFF800000u) | 0x00400000u)};
  }

  // Decode: whole pairs of blocks of N panels a step.
  template <u32 N> struct Step {
    static constexpr u32 BLOCKS = LINES == 4 ? 4 / N : 2;
    static constexpr u32 PANEL_BYTES = BLOCKS / 2 * PAIR_BYTES;
    static constexpr u32 BYTES = N * PANEL_BYTES;
    static constexpr u32 SLOTS = BYTES > 2048 ? 3 : 5;

    // What a lane copies next of each panel, and the pieces of 16 bytes 32 apart.
    const u8* from[N];

    __device__ __forceinline__ void begin(const Panel (&panels)[N], u32 blocks, u32 first) {
#pragma unroll
      for (u32 n = 0; n < N; n++) from[n] = pair_at(panels[n], blocks, first) + threadIdx.x % WARP * 16;
    }

    // Has the warp copy the next step, of which `left` blocks are there or more.
    __device__ __forceinline__ void copy(u8* to, u32 left) {
      u32 own = threadIdx.x % WARP * 16, bytes = left < BLOCKS ? bytes_of(left) : PANEL_BYTES;
#pragma unroll
      for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 at = 0; at < PANEL_BYTES; at += WARP * 16) {
          if (own + at < bytes) cp_async16(to + n * PANEL_BYTES + own + at, from[n] + at);
        }
        from[n] += PANEL_BYTES;
      }
    }
  };

  // A lane's place in the activations.
  struct Inputs {
    const u8* x;           // of token g
    const Head* heads[2];  // of tokens 2 t and 2 t + 1

    __device__ __forceinline__ Inputs(const Product& p, const Tile& tile, Lane lane, u32 first) {
      // Past the last token it stands in: columns do not mix, and theirs are not written.
      auto row = [&](u32 token) { return u64(source_of(p, tile.first + min(token, tile.count - 1))) * p.blocks + first; };
      x = p.x + row(lane.g) * BLOCK + lane.t * 4;
#pragma unroll
      for (u32 j = 0; j < 2; j++) heads[j] = p.heads + row(2 * lane.t + j);
    }

    __device__ __forceinline__ void move(i32 blocks) {
      x += blocks * i32(BLOCK);
      for (u32 j = 0; j < 2; j++) heads[j] += blocks;
    }
  };

  // Adds block `i` of a step that has come, where the inputs stand.
  template <u32 N>
  static __device__ __forceinline__ void add_block(Sums (&sums)[N], const u8* from, const Inputs& inputs, u32 i, Lane lane) {
    const u8* x = inputs.x + i * BLOCK;
    u32 values[2] = {*reinterpret_cast<const u32*>(x), *reinterpret_cast<const u32*>(x + 16)};
    Head heads[2] = {head_of(inputs.heads[0][i].start), head_of(inputs.heads[1][i].start)};
#pragma unroll
    for (u32 n = 0; n < N; n++) {
      const u8* pair = from + n * Step<N>::PANEL_BYTES + i / 2 * PAIR_BYTES;
      const u8* quants = pair + LINE + i % 2 * BLOCK_BYTES + lane.t * LINE + lane.g * 8;
      u32 w[LINES / 2], a[4];
#pragma unroll
      for (u32 h = 0; h < LINES / 4; h++) {
        U32x2 two = *reinterpret_cast<const U32x2*>(quants + h * 4 * LINE);
        w[2 * h] = two.x;
        w[2 * h + 1] = two.y;
      }
      unpack(w, a);
      u32 scales = *reinterpret_cast<const u32*>(pair + i % 2 * SCALES_BYTES + 2 * lane.g * 2);
      add(sums[n], a, values, heads, f16_to_f32(u16(scales)), f16_to_f32(u16(scales >> 16)));
    }
  }

  // Prompt: a pair of blocks of everything a stage.
  static constexpr u32 BLOCKS_PER_STAGE = 2;
  static constexpr u32 STAGES = 3;
  static constexpr u32 TOKENS = 64;
  static constexpr u32 SCALES_AT = PANELS * BLOCKS_PER_STAGE * BLOCK_BYTES;
  static constexpr u32 X_AT = SCALES_AT + PANELS * BLOCKS_PER_STAGE * PANEL_ROWS * 2;
  static constexpr u32 HEADS_AT = X_AT + TOKENS * BLOCKS_PER_STAGE * BLOCK;
  static constexpr u32 STAGE_BYTES = HEADS_AT + TOKENS * BLOCKS_PER_STAGE * sizeof(Head);
  // Pieces of 16 bytes: of a panel's quants, which one warp copies; of its scales 4; of a token's activations 4.
  static constexpr u32 PIECES = BLOCKS_PER_STAGE * BLOCK_BYTES / 16;
  static_assert(PANELS * WARP == THREADS && TOKENS * 4 == THREADS, "all threads copy");

  // What a thread copies of stage 0.
  struct Source {
    const u8* quants;  // and every 32nd piece after it
    const u8* scales;
    u32 x;  // where the token's row begins, in blocks
  };

  static __device__ __forceinline__ Source source(const Product& p, const Tile& tile, u32 panel, u32 thread) {
    const u8* pair = pair_at(panel_at(p, tile.expert, panel + thread / WARP), p.blocks, 0);
    // Past the last token the last one stands in.
    u32 token = source_of(p, tile.first + min(thread / 4, tile.count - 1));
    return {pair + LINE + thread % WARP * 16, pair + thread % 4 * 16, token * p.blocks};
  }

  static __device__ __forceinline__ void copy(u8* to, const Source& s, const Product& p, u32 stage, u32 thread) {
    u32 b = stage * BLOCKS_PER_STAGE;
    // The last stage may have a block less. (Its line of scales is whole.)
    u32 left = p.blocks - b;
    u32 panel = thread / WARP, lane = thread % WARP;
#pragma unroll
    for (u32 i = lane; i < PIECES; i += WARP) {
      if (i * 16 < left * BLOCK_BYTES) {
        cp_async16(to + (panel * PIECES + i) * 16, s.quants + u64(stage) * PAIR_BYTES + (i - lane) * 16);
      }
    }
    if (lane < 4) cp_async16(to + SCALES_AT + (panel * 4 + lane) * 16, s.scales + u64(stage) * PAIR_BYTES);
    // Halves of a block change places for every other four tokens: reading is then free of conflicts.
    u32 token = thread / 4, block = thread % 4 / 2, half = thread % 2;
    if (block < left) {
      u32 at = (block * TOKENS + token) * BLOCK + (half ^ (token / 4 % 2)) * 16;
      cp_async16(to + X_AT + at, p.x + u64(s.x + b) * BLOCK + thread % 4 * 16);
    }
    block = thread % 4;
    if (block < BLOCKS_PER_STAGE && block < left) {
      cp_async8(to + HEADS_AT + (block * TOKENS + token) * sizeof(Head), p.heads + s.x + b + block);
    }
  }

  // Adds block `block` of a stage: panels `panel` and `panel + 1`, half the tokens, from `token` on.
  static __device__ __forceinline__ void add(Sums (&sums)[2][TOKENS / 16], const u8* from, u32 block, u32 panel, u32 token, Lane lane) {
    u32 a[2][4];
    float low[2], high[2];
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
      const u8* quants = from + ((panel + n) * BLOCKS_PER_STAGE + block) * BLOCK_BYTES + lane.t * LINE + lane.g * 8;
      u32 w[LINES / 2];
#pragma unroll
      for (u32 h = 0; h < LINES / 4; h++) {
        U32x2 two = *reinterpret_cast<const U32x2*>(quants + h * 4 * LINE);
        w[2 * h] = two.x;
        w[2 * h + 1] = two.y;
      }
      unpack(w, a[n]);
      u32 at = SCALES_AT + (((panel + n) * BLOCKS_PER_STAGE + block) * PANEL_ROWS + 2 * lane.g) * 2;
      u32 scales = *reinterpret_cast<const u32*>(from + at);
      low[n] = f16_to_f32(u16(scales));
      high[n] = f16_to_f32(u16(scales >> 16));
    }
#pragma unroll
    for (u32 i = 0; i < TOKENS / 16; i++) {
      u32 first = block * TOKENS + token + 8 * i;
      const u8* x = from + X_AT + (first + lane.g) * BLOCK + lane.t * 4;
      u32 swap = lane.g / 4 * 16;
      u32 b[2] = {*reinterpret_cast<const u32*>(x + swap), *reinterpret_cast<const u32*>(x + (swap ^ 16))};
      U32x4 two = *reinterpret_cast<const U32x4*>(from + HEADS_AT + (first + 2 * lane.t) * sizeof(Head));
      Head heads[2] = {{i32(two.x), __uint_as_float(two.y)}, {i32(two.z), __uint_as_float(two.w)}};
#pragma unroll
      for (u32 n = 0; n < 2; n++) add(sums[n][i], a[n], b, heads, low[n], high[n]);
    }
  }
};

// What bf16 and the floats share: row-major weights of `W`, activations of `X`, rows padded to whole blocks;
// `T` tokens of a prompt's block.
template <class W, class X, u32 T> struct RowMajor {
  static constexpr u32 TOKENS = T;
  static constexpr u32 W_PIECES = BLOCK * sizeof(W) / 16, X_PIECES = BLOCK * sizeof(X) / 16;

  // Row `row` of a panel; the last one of the matrix stands for those past it.
  static __device__ __forceinline__ const u8* row_of(const Panel& panel, u32 row, u32 blocks) {
    u32 at = panel.index * PANEL_ROWS + row;
    u32 last = panel.rows > 0 ? panel.rows - 1 : 0;
    return panel.weights + u64(at < last ? at : last) * blocks * BLOCK * sizeof(W);
  }

  // The row of a token; past the last one it stands in: sums of tokens do not mix, and theirs are not written.
  static __device__ __forceinline__ const u8* token_of(const Product& p, const Tile& tile, u32 token) {
    return p.x + u64(source_of(p, tile.first + min(token, tile.count - 1))) * p.blocks * BLOCK * sizeof(X);
  }

  // Decode: 2 KiB a step, but for pairs of f32.
  template <u32 N> struct Step {
    static constexpr u32 BLOCKS = sizeof(W) == 2 ? 2 / N : 1;
    static constexpr u32 PIECES = BLOCKS * W_PIECES;  // of a row
    static constexpr u32 PANEL_BYTES = PANEL_ROWS * PIECES * 16;
    static constexpr u32 BYTES = N * PANEL_BYTES;
    static constexpr u32 SLOTS = BYTES > 2048 ? 2 : 3;
    // A lane copies piece `lane % PIECES` of every so many rows.
    static constexpr u32 APART = WARP / PIECES, ROWS = PANEL_ROWS / APART;

    const u8* from[N][ROWS];

    __device__ __forceinline__ void begin(const Panel (&panels)[N], u32 blocks, u32 first) {
      u32 lane = threadIdx.x % WARP;
#pragma unroll
      for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
          from[n][r] = row_of(panels[n], lane / PIECES + r * APART, blocks) + u64(first) * BLOCK * sizeof(W) + lane % PIECES * 16;
        }
      }
    }

    __device__ __forceinline__ void copy(u8* to, u32 left) {
      u32 lane = threadIdx.x % WARP, piece = lane % PIECES;
#pragma unroll
      for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
          u32 at = n * PANEL_BYTES + place(lane / PIECES + r * APART, piece, PIECES);
          if (piece < left * W_PIECES) cp_async16(to + at, from[n][r]);
          from[n][r] += PIECES * 16;
        }
      }
    }
  };

  // Prompt: a block a stage, `[panels][16 rows]` and `[tokens]`.
  static constexpr u32 BLOCKS_PER_STAGE = 1;
  static constexpr u32 X_AT = PANELS * PANEL_ROWS * BLOCK * sizeof(W);
  static constexpr u32 STAGE_BYTES = X_AT + TOKENS * BLOCK * sizeof(X);
  static constexpr u32 W_PER_THREAD = PANELS * PANEL_ROWS * W_PIECES / THREADS;
  static constexpr u32 X_PER_THREAD = TOKENS * X_PIECES / THREADS;

  // Where piece `piece` of row `row` stands. Pairs of rows lie together and their pieces change places, so
  // that neither the rows of one parity nor neighbouring ones meet in the same banks.
  static __device__ __forceinline__ u32 place(u32 row, u32 piece, u32 pieces) {
    u32 pair = row / 2, in_pair = row % 2 * pieces + piece;
    u32 swap = pieces == 8 ? pair % 8 : pair % 2 * 4;
    return (pair * 2 * pieces + (in_pair ^ swap)) * 16;
  }

  struct Source {
    const u8* w[W_PER_THREAD];
    const u8* x[X_PER_THREAD];
  };

  static __device__ __forceinline__ Source source(const Product& p, const Tile& tile, u32 panel, u32 thread) {
    Source s;
    for (u32 i = 0; i < W_PER_THREAD; i++) {
      u32 piece = thread + i * THREADS, row = piece / W_PIECES;
      Panel of = panel_at(p, tile.expert, panel + row / PANEL_ROWS);
      s.w[i] = row_of(of, row % PANEL_ROWS, p.blocks) + piece % W_PIECES * 16;
    }
    for (u32 i = 0; i < X_PER_THREAD; i++) {
      u32 piece = thread + i * THREADS;
      s.x[i] = token_of(p, tile, piece / X_PIECES) + piece % X_PIECES * 16;
    }
    return s;
  }

  static __device__ __forceinline__ void copy(u8* to, const Source& s, const Product &, u32 stage, u32 thread) {
    for (u32 i = 0; i < W_PER_THREAD; i++) {
      u32 piece = thread + i * THREADS;
      u32 at = place(piece / W_PIECES, piece % W_PIECES, W_PIECES);
      cp_async16(to + at, s.w[i] + u64(stage) * BLOCK * sizeof(W));
    }
    for (u32 i = 0; i < X_PER_THREAD; i++) {
      u32 piece = thread + i * THREADS;
      u32 at = place(piece / X_PIECES, piece % X_PIECES, X_PIECES);
      cp_async16(to + X_AT + at, s.x[i] + u64(stage) * BLOCK * sizeof(X));
    }
  }
};

// bf16 weights and activations.
struct Bf16 : RowMajor<u16, u16, 128> {
  // Adds a block from 16 bytes each of rows 2 g and 2 g + 1 and of token g.
  static __device__ __forceinline__ void add(Sums& sums, const U32x4& low, const U32x4& high, const U32x4& x) {
    u32 a[4] = {low.x, high.x, low.y, high.y}, b[2] = {x.x, x.y};
    mma_bf16(sums.at, a, b);
    u32 c[4] = {low.z, high.z, low.w, high.w}, d[2] = {x.z, x.w};
    mma_bf16(sums.at, c, d);
  }

  struct Inputs {
    const u8* x;  // of token g

    __device__ __forceinline__ Inputs(const Product& p, const Tile& tile, Lane lane, u32 first) {
      x = token_of(p, tile, lane.g) + u64(first) * BLOCK * 2 + lane.t * 16;
    }

    __device__ __forceinline__ void move(i32 blocks) { x += blocks * i32(BLOCK * 2); }
  };

  template <u32 N>
  static __device__ __forceinline__ void add_block(Sums (&sums)[N], const u8* from, const Inputs& inputs, u32 i, Lane lane) {
    U32x4 x = *reinterpret_cast<const U32x4*>(inputs.x + i * BLOCK * 2);
#pragma unroll
    for (u32 n = 0; n < N; n++) {
      U32x4 rows[2];
#pragma unroll
      for (u32 r = 0; r < 2; r++) {
        u32 at = Step<N>::PANEL_BYTES * n + place(2 * lane.g + r, i * W_PIECES + lane.t, Step<N>::PIECES);
        rows[r] = *reinterpret_cast<const U32x4*>(from + at);
      }
      add(sums[n], rows[0], rows[1], x);
    }
  }

  static constexpr u32 STAGES = 4;

  static __device__ __forceinline__ void add(Sums (&sums)[2][TOKENS / 16], const u8* from, u32, u32 panel, u32 token, Lane lane) {
    U32x4 rows[2][2];
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
#pragma unroll
      for (u32 r = 0; r < 2; r++) {
        u32 at = place((panel + n) * PANEL_ROWS + 2 * lane.g + r, lane.t, W_PIECES);
        rows[n][r] = *reinterpret_cast<const U32x4*>(from + at);
      }
    }
#pragma unroll
    for (u32 i = 0; i < TOKENS / 16; i++) {
      u32 at = X_AT + place(token + 8 * i + lane.g, lane.t, X_PIECES);
      U32x4 x = *reinterpret_cast<const U32x4*>(from + at);
#pragma unroll
      for (u32 n = 0; n < 2; n++) add(sums[n][i], rows[n][0], rows[n][1], x);
    }
  }
};

// f32 or f16 weights, f32 activations: the definition, for comparisons, not for speed. A lane has its rows
// and tokens to itself.
template <class W> struct Floats : RowMajor<W, float, 64> {
  using Rows = RowMajor<W, float, 64>;
  // Columns that a lane reads at a time.
  static constexpr u32 COLS = 8;

  template <u32 N> using Step = typename Rows::template Step<N>;

  struct Inputs {
    const u8* x[2];  // of tokens 2 t and 2 t + 1

    __device__ __forceinline__ Inputs(const Product& p, const Tile& tile, Lane lane, u32 first) {
      for (u32 j = 0; j < 2; j++) x[j] = Rows::token_of(p, tile, 2 * lane.t + j) + u64(first) * BLOCK * sizeof(float);
    }

    __device__ __forceinline__ void move(i32 blocks) {
      for (u32 j = 0; j < 2; j++) x[j] += blocks * i32(BLOCK * sizeof(float));
    }
  };

  // Eight weights, whose pieces of 16 bytes are at `at[0]` and, for f32, `at[1]`.
  static __device__ __forceinline__ void widen(float (&out)[COLS], const u8* const (&at)[2]) {
    if constexpr (sizeof(W) == 4) {
      for (u32 i = 0; i < COLS; i++) out[i] = reinterpret_cast<const float*>(at[i / 4])[i % 4];
    } else {
      for (u32 i = 0; i < COLS; i++) out[i] = f16_to_f32(reinterpret_cast<const u16*>(at[0])[i]);
    }
  }

  template <u32 N>
  static __device__ __forceinline__ void add_block(Sums (&sums)[N], const u8* from, const Inputs& inputs, u32 block, Lane lane) {
    constexpr u32 PIECES = COLS * sizeof(W) / 16;
#pragma unroll 1
    for (u32 k = 0; k < BLOCK; k += COLS) {
      float w[N][2][COLS];
      for (u32 n = 0; n < N; n++) {
        for (u32 r = 0; r < 2; r++) {
          const u8* at[2];
          for (u32 h = 0; h < 2; h++) {
            u32 piece = block * Rows::W_PIECES + k / COLS * PIECES + h % PIECES;
            at[h] = from + n * Step<N>::PANEL_BYTES + Rows::place(2 * lane.g + r, piece, Step<N>::PIECES);
          }
          widen(w[n][r], at);
        }
      }
      for (u32 j = 0; j < 2; j++) {
        const float* values = reinterpret_cast<const float*>(inputs.x[j]) + block * BLOCK + k;
        for (u32 i = 0; i < COLS; i++) {
          float value = values[i];
          for (u32 n = 0; n < N; n++) {
            for (u32 r = 0; r < 2; r++) {
              sums[n].at[2 * r + j] = fmaf(w[n][r][i], value, sums[n].at[2 * r + j]);
            }
          }
        }
      }
    }
  }

  static constexpr u32 STAGES = sizeof(W) == 4 ? 2 : 3;

  static __device__ __forceinline__ void add(Sums (&sums)[2][Rows::TOKENS / 16], const u8* from, u32, u32 panel, u32 token, Lane lane) {
#pragma unroll 1
    for (u32 c = 0; c < BLOCK / COLS; c++) {
      float w[2][2][COLS];
#pragma unroll
      for (u32 n = 0; n < 2; n++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
          u32 row = (panel + n) * PANEL_ROWS + 2 * lane.g + r;
          constexpr u32 PIECES = COLS * sizeof(W) / 16;
          const u8* at[2];
          for (u32 h = 0; h < 2; h++) {
            at[h] = from + Rows::place(row, c * PIECES + h % PIECES, Rows::W_PIECES);
          }
          widen(w[n][r], at);
        }
      }
#pragma unroll
      for (u32 i = 0; i < Rows::TOKENS / 16; i++) {
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
#pragma unroll
          for (u32 h = 0; h < 2; h++) {
            u32 at = Rows::place(token + 8 * i + 2 * lane.t + j, 2 * c + h, Rows::X_PIECES);
            const float* x = reinterpret_cast<const float*>(from + Rows::X_AT + at);
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
#pragma unroll
              for (u32 n = 0; n < 2; n++) {
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                  float& sum = sums[n][i].at[2 * r + j];
                  sum = fmaf(w[n][r][4 * h + k], x[k], sum);
                }
              }
            }
          }
        }
      }
    }
  }
};

// What of the columns a thread block has after that one. Two of gates make a block of 32 results, and follow one
// another.
template <u32 N> __device__ __forceinline__ u32 column_after(u32 column) {
  column++;
  return column % N == 0 ? column + (gridDim.y - 1) * N : column;
}

// The steps of all the columns of a thread block that a warp goes through, each of its K range, `first .. last`;
// they come through a ring in shared memory that is the warp's own.
template <class Format, u32 N> struct Stream {
  using Step = typename Format::template Step<N>;

  static constexpr u32 BYTES = Step::SLOTS * Step::BYTES;

  const Product& p;
  u8* ring;
  u32 expert, first, last;
  // What is copied next, and where to.
  Step from;
  u32 column, b, to = 0;

  __device__ __forceinline__ Stream(const Product& p, u8* ring, u32 expert, u32 first, u32 last)
      : p(p), ring(ring), expert(expert), first(first), last(last), column(blockIdx.y * N), b(first) {}

  static __device__ __forceinline__ u32 after(u32 slot) { return slot + Step::BYTES == BYTES ? 0 : slot + Step::BYTES; }

  __device__ __forceinline__ void copy() {
    if (column < columns_of<N>(p) && b < last) {
      if (b == first) {
        Panel panels[N];
        for (u32 n = 0; n < N; n++) panels[n] = panel_at(p, expert, column * N + n);
        from.begin(panels, p.blocks, first);
      }
      from.copy(ring + to, last - b);
      b += Step::BLOCKS;
      if (b >= last) {
        b = first;
        column = column_after<N>(column);
      }
    }
    cp_async_commit();
    to = after(to);
  }

  // All that the ring holds but one slot, which is free.
  __device__ __forceinline__ void begin() {
#pragma unroll 1
    for (u32 i = 0; i + 1 < Step::SLOTS; i++) copy();
  }

  // The sums of the next column; the inputs stand at the first of its blocks, and do so again.
  __device__ __forceinline__ void sum(Sums (&sums)[N], typename Format::Inputs& inputs, Lane lane) {
    i32 left = i32(last) - i32(first), moved = 0;
    for (; left > 0; left -= Step::BLOCKS) {
      // The oldest step is there for all lanes, and all have read the one before, whose slot is free.
      cp_async_wait<Step::SLOTS - 2>();
      __syncwarp();
      const u8* step = ring + after(to);
      copy();
      if (left >= i32(Step::BLOCKS)) {
#pragma unroll
        for (u32 i = 0; i < Step::BLOCKS; i++) Format::add_block(sums, step, inputs, i, lane);
      } else {
#pragma unroll 1
        for (i32 i = 0; i < left; i++) Format::add_block(sums, step, inputs, i, lane);
      }
      inputs.move(Step::BLOCKS);
      moved += Step::BLOCKS;
    }
    inputs.move(-moved);
  }
};

// Up to 8 tokens (`blockIdx.x` counts them) times one panel, or a gate's and up's: a column. `blockIdx.y` has
// every `gridDim.y`th of them, or of two.
template <class Format, u32 N> __device__ __forceinline__ void decode(const Product& p) {
  DYN_SHARED(u8, shared);
  __shared__ float partial[RANGES][N][FEW][PANEL_ROWS];
  __shared__ float results[N == 2 ? FEW : 1][BLOCK];
  static_assert(2 * PANEL_ROWS == BLOCK && FEW == RANGES, "a warp puts a block of the results of a token");
  u32 thread = threadIdx.x, warp = thread / WARP;
  u32 first = warp * p.range, last = min(first + p.range, p.blocks);
  let_next_begin();
  // Of which expert the weights are only the kernel before says.
  if (p.tiles) await_previous();
  Tile tile = tile_at(p, blockIdx.x, FEW, FEW);
  if (tile.count == 0) return;
  Lane lane = lane_of(thread);
  Stream<Format, N> stream(p, shared + warp * Stream<Format, N>::BYTES, tile.expert, first, last);
  stream.begin();
  if (!p.tiles) await_previous();
  typename Format::Inputs inputs(p, tile, lane, first);

  // A thread has two neighbouring rows of a token, or the two that a gate joins.
  constexpr u32 ROWS = PANEL_ROWS * N / 2;
  u32 token = thread / ROWS, row = thread % ROWS, columns = columns_of<N>(p);
  for (u32 column = blockIdx.y * N; column < columns; column = column_after<N>(column)) {
    Sums sums[N] = {};
    stream.sum(sums, inputs, lane);
    for (u32 n = 0; n < N; n++) {
      for (u32 i = 0; i < 4; i++) partial[warp][n][2 * lane.t + i % 2][2 * lane.g + i / 2] = sums[n].at[i];
    }
    __syncthreads();
    if (token < tile.count) {
      Panel panels[N];
      for (u32 n = 0; n < N; n++) panels[n] = panel_at(p, tile.expert, column * N + n);
      float a = 0.0f, b = 0.0f;
      for (u32 r = 0; r < RANGES; r++) {
        a += partial[r][0][token][N == 1 ? 2 * row : row];
        b += partial[r][N - 1][token][N == 1 ? 2 * row + 1 : row];
      }
      if constexpr (N == 1) {
        put_rows(p, panels[0], tile.first + token, panels[0].index * PANEL_ROWS + 2 * row, a, b);
      } else {
        results[token][column % N * PANEL_ROWS + row] = gated(panels[0], panels[1], panels[0].index * PANEL_ROWS + row, a, b);
        // The last block of results may be half a one.
        if (column + 1 == columns && column % N == 0) results[token][PANEL_ROWS + row] = 0.0f;
      }
    }
    __syncthreads();    // before the next column's sums
    if constexpr (N == 2) {
      if ((column % N == 1 || column + 1 == columns) && warp < tile.count) {
        u32 at = thread % WARP;
        p.y.put(tile.first + warp, column / N * BLOCK + at, results[warp][at]);
      }
    }
  }
}

// `Format::TOKENS` tokens (`blockIdx.x`) times 8 panels (`blockIdx.y`).
template <class Format> __device__ __forceinline__ void prompt(const Product& p) {
  DYN_SHARED(u8, shared);
  u32 thread = threadIdx.x, warp = thread / 32;
  Tile tile = tile_at(p, blockIdx.x, Format::TOKENS, MANY);
  if (tile.count == 0) return;

  auto source = Format::source(p, tile, blockIdx.y * PANELS, thread);
  u32 stages = (p.blocks + Format::BLOCKS_PER_STAGE - 1) / Format::BLOCKS_PER_STAGE;
  for (u32 s = 0; s < Format::STAGES - 1; s++) {
    if (s < stages) Format::copy(shared + s * Format::STAGE_BYTES, source, p, s, thread);
    cp_async_commit();
  }

  Lane lane = lane_of(thread);
  u32 panel = warp % (PANELS / 2) * 2, token = warp / (PANELS / 2) * (Format::TOKENS / 2);
  constexpr u32 EIGHTS = Format::TOKENS / 16;  // of tokens, that a warp has
  Sums sums[2][EIGHTS] = {}, totals[2][EIGHTS] = {};
  auto end_range = [&] {
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
#pragma unroll
      for (u32 i = 0; i < EIGHTS; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
          totals[n][i].at[j] += sums[n][i].at[j];
          sums[n][i].at[j] = 0.0f;
        }
      }
    }
  };
  u32 end = p.range;
  for (u32 s = 0; s < stages; s++) {
    // Stage s has come, for all threads; all have read the one that is overwritten next.
    cp_async_wait<Format::STAGES - 2>();
    __syncthreads();
    u32 next = s + Format::STAGES - 1;
    if (next < stages) Format::copy(shared + next % Format::STAGES * Format::STAGE_BYTES, source, p, next, thread);
    cp_async_commit();
    if (token >= tile.count) continue;
    const u8* from = shared + s % Format::STAGES * Format::STAGE_BYTES;
#pragma unroll
    for (u32 block = 0; block < Format::BLOCKS_PER_STAGE; block++) {
      u32 b = s * Format::BLOCKS_PER_STAGE + block;
      if (b >= p.blocks) break;
      Format::add(sums, from, block, panel, token, lane);
      if (b + 1 == end) {
        end_range();
        end += p.range;
      }
    }
  }
  end_range();

  Panel panels[2];
  for (u32 n = 0; n < 2; n++) panels[n] = panel_at(p, tile.expert, blockIdx.y * PANELS + panel + n);
#pragma unroll
  for (u32 i = 0; i < EIGHTS; i++) {
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      u32 at = token + 8 * i + 2 * lane.t + j;
      if (at >= tile.count) continue;
      u32 slot = tile.first + at;
      if (p.gate == SILU) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
          u32 row = panels[0].index * PANEL_ROWS + 2 * lane.g + r;
          float v = gated(panels[0], panels[1], row, totals[0][i].at[2 * r + j], totals[1][i].at[2 * r + j]);
          if (row < panels[0].rows) p.y.row(slot)[row] = v;
        }
      } else {
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
          u32 row = panels[n].index * PANEL_ROWS + 2 * lane.g;
          put_rows(p, panels[n], slot, row, totals[n][i].at[j], totals[n][i].at[2 + j]);
        }
      }
    }
  }
}

#define DECODE(NAME, Format, N, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(PARAMETERS) { decode<Format, N>(PRODUCT); }
#define KERNELS_OF(name, Format, FEW_BLOCKS, BLOCKS)                                        \
  DECODE(name##_decode, Format, 1, FEW_BLOCKS)                                            \
  DECODE(name##_decode_gated, Format, 2, FEW_BLOCKS)                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name##_prompt(PARAMETERS) { \
    after_previous();                                                                      \
    prompt<Format>(PRODUCT);                                                               \
  }

KERNELS_OF(q4, Packed<4>, 4, 2)
KERNELS_OF(q8, Packed<8>, 4, 2)
KERNELS_OF(bf16, Bf16, 4, 1)
KERNELS_OF(f32, Floats<float>, 2, 1)
KERNELS_OF(f16, Floats<u16>, 2, 1)
