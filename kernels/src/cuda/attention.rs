//! Rotary embedding, the cache, attention.
//!
//! The maths, the order of the sums and the work are at the head of `attention.cu`.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Memory, Source, Span};
use phidias_quant::f16;
use std::mem::size_of;
use std::sync::Arc;

/// The kernels of `attention.cu`.
pub(super) const KERNELS: &[&str] = &[
    "rope_and_store_f16",
    "rope_and_store_f32",
    "attend_decode_f16_32",
    "attend_decode_f16_64",
    "attend_decode_f16_96",
    "attend_decode_f16_128",
    "attend_decode_f32",
    "attend_prompt_f16_32",
    "attend_prompt_f16_64",
    "attend_prompt_f16_96",
    "attend_prompt_f16_128",
    "attend_prompt_f32",
    "attend_full_f16_32",
    "attend_full_f16_64",
    "attend_full_f16_96",
    "attend_full_f16_128",
    "attend_full_f32",
];

/// Positions that are merged to one partial result: `engine::mask::BLOCK`.
const BLOCK: usize = 256;
/// Warps of a thread block.
const WARPS: usize = 8;
/// Queries of a warp.
const TILE: usize = 16;
/// Threads of a block.
const THREADS: usize = 32 * WARPS;
/// The widest head.
pub const HEAD_DIM: usize = 128;

/// How the heads lie in a row of the projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadOrder {
    /// All queries, all keys, all values.
    Parts,
    /// For each KV head its queries, its key, its value.
    Groups,
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements of a head: a multiple of 8, at most [`HEAD_DIM`].
    pub head_dim: usize,
    /// How they lie in a row of the projections.
    pub order: HeadOrder,
}

impl Heads {
    /// Columns of the projections: queries, keys and values.
    #[must_use]
    pub fn columns(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the queries, and of the result.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// # Panics
    /// When the kernels cannot take them.
    fn check(&self) {
        let Self {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self;
        assert!(
            (1..=0xFFFF).contains(&heads) && kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} heads for {kv_heads} of keys"
        );
        assert!(
            (8..=HEAD_DIM).contains(&head_dim) && head_dim.is_multiple_of(8),
            "heads of {head_dim}: expected a multiple of 8, at most {HEAD_DIM}"
        );
    }

    /// `heads, kv_heads, head_dim, grouped`
    fn args(&self) -> [Arg; 4] {
        let grouped = matches!(self.order, HeadOrder::Groups);
        [
            self.heads,
            self.kv_heads,
            self.head_dim,
            usize::from(grouped),
        ]
        .map(number)
    }

    /// Rows of `qkv`.
    fn tokens(&self, qkv: Span<'_, f32>) -> usize {
        assert!(
            qkv.len().is_multiple_of(self.columns()),
            "{} projections in rows of {}",
            qkv.len(),
            self.columns()
        );
        qkv.len() / self.columns()
    }

    /// The kernels `<family>_<arithmetic>`; those on f16 are made for heads of whole 32s.
    fn kernel(&self, family: &str, half: bool) -> Kernel {
        let arithmetic = match (half, self.head_dim.next_multiple_of(32)) {
            (false, _) => "f32".to_owned(),
            (true, width) => format!("f16_{width}"),
        };
        kernel(&format!("{family}_{arithmetic}"))
    }
}

/// Which keys at or before it a query sees: `engine::mask::Mask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All, or the last `window`, the query's own included.
    Causal {
        /// Keys that each query sees at most.
        window: Option<usize>,
    },
    /// Whole blocks of positions. Head `h` in query block `q` sees key block `k <= q` when
    /// `q - k < local_blocks` or `(k + h * head_step + 1) % vert_stride == 0`.
    BlockSparse {
        /// Positions in a block: a multiple of 16 that divides 256.
        block: usize,
        /// Blocks that every head sees, its own included; at least one.
        local_blocks: usize,
        /// Of this many blocks one is seen for ever; at least one.
        vert_stride: usize,
        /// By how much the strides of neighbouring heads differ.
        head_step: usize,
    },
}

impl Mask {
    /// `window, block, local_blocks, vert_stride, head_step`
    fn args(&self) -> [Arg; 5] {
        match *self {
            Self::Causal { window } => {
                assert_ne!(window, Some(0), "keys of a window");
                // A window that no context fills is none.
                let window = window.map_or(u32::MAX, |w| u32::try_from(w).unwrap_or(u32::MAX));
                [window, 0, 0, 1, 0].map(Arg::U32)
            }
            Self::BlockSparse {
                block,
                local_blocks,
                vert_stride,
                head_step,
            } => {
                assert!(
                    block.is_multiple_of(16) && block > 0 && BLOCK.is_multiple_of(block),
                    "blocks of {block}: expected a multiple of 16 that divides {BLOCK}"
                );
                assert!(
                    (1..1 << 24).contains(&local_blocks) && (1..1 << 24).contains(&vert_stride),
                    "{local_blocks} local blocks, one in {vert_stride} for ever"
                );
                assert!(head_step < 1 << 8, "head_step {head_step}");
                [0, block, local_blocks, vert_stride, head_step].map(number)
            }
        }
    }
}

/// Keys and values of one layer, each `[kv_heads, context, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub enum Cache<'m> {
    /// The usual: attention runs on tensor cores.
    F16 {
        /// Keys, rotated.
        keys: Span<'m, f16>,
        /// Values.
        values: Span<'m, f16>,
    },
    /// Exact: attention in f32 throughout.
    F32 {
        /// Keys, rotated.
        keys: Span<'m, f32>,
        /// Values.
        values: Span<'m, f32>,
    },
}

impl Cache<'_> {
    fn is_half(&self) -> bool {
        matches!(self, Self::F16 { .. })
    }

    /// Positions allocated.
    fn context(&self, heads: Heads) -> usize {
        let (keys, values) = match self {
            Self::F16 { keys, values } => (keys.len(), values.len()),
            Self::F32 { keys, values } => (keys.len(), values.len()),
        };
        let position = heads.kv_heads * heads.head_dim;
        assert_eq!(keys, values, "elements of keys and values");
        assert!(
            keys > 0 && keys.is_multiple_of(position),
            "{keys} elements of keys, {position} a position"
        );
        let context = keys / position;
        assert!(context < 1 << 30, "{context} positions");
        context
    }

    /// `keys, values`
    fn args(&self, device: &dyn Device) -> [Arg; 2] {
        match self {
            Self::F16 { keys, values } => [keys.on(device), values.on(device)],
            Self::F32 { keys, values } => [keys.on(device), values.on(device)],
        }
    }
}

/// Rotations of the tokens of a pass, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Rotations<'m> {
    /// `[tokens, head_dim / 2]`
    pub cos: Span<'m, f32>,
    /// `[tokens, head_dim / 2]`
    pub sin: Span<'m, f32>,
}

/// In what attention without a cache computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Keys, values, queries and weights rounded to f16, sums f32: tensor cores.
    F16,
    /// f32 throughout.
    F32,
}

/// Room for the partial results of passes of a few tokens over a long cache. One serves all layers.
#[derive(Debug)]
pub struct Scratch {
    memory: Memory,
    heads: usize,
    head_dim: usize,
    blocks: usize,
    tokens: usize,
    /// Thread blocks that can be under way.
    places: usize,
}

impl Scratch {
    /// For passes of up to `tokens` tokens with `context` positions allocated: these are split among
    /// thread blocks by ranges of the cache, longer ones by queries, with the same results.
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    /// # Panics
    /// When the kernels cannot take the heads.
    pub fn new(
        device: &Arc<dyn Device>,
        heads: Heads,
        context: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        heads.check();
        let memory = Memory::new(device, Self::bytes(heads, context, tokens))?;
        let scratch = Self {
            heads: heads.heads,
            head_dim: heads.head_dim,
            blocks: context.div_ceil(BLOCK),
            tokens,
            places: 4 * device.limits().multiprocessors as usize,
            memory,
        };
        // The counts are 0 between launches.
        scratch.parts()[3].zero()?;
        Ok(scratch)
    }

    /// Its size.
    #[must_use]
    pub fn bytes(heads: Heads, context: usize, tokens: usize) -> usize {
        let rows = heads.heads * tokens;
        let partials = context.div_ceil(BLOCK) * rows;
        (partials * (heads.head_dim + 2) + rows) * size_of::<f32>()
    }

    /// Weighted values, maxima, sums, and counts of thread blocks.
    fn parts(&self) -> [Span<'_, u32>; 4] {
        let all = self.memory.span::<u32>();
        let partials = self.blocks * self.heads * self.tokens;
        let acc = partials * self.head_dim;
        [
            all.slice(..acc),
            all.slice(acc..acc + partials),
            all.slice(acc + partials..acc + 2 * partials),
            all.slice(acc + 2 * partials..),
        ]
    }
}

fn kernel(name: &str) -> Kernel {
    let name = KERNELS.iter().find(|known| **known == name);
    Kernel {
        source: Source::Attention,
        name: name.expect("a kernel for every head_dim"),
    }
}

/// A count that the kernels take in 32 bits.
fn number(n: usize) -> Arg {
    Arg::U32(u32::try_from(n).expect("less than 2^32"))
}

/// Rotates queries and keys of every row of `qkv`, row `t` by rotation `t`, and stores keys and values at
/// positions `first[0] + t` of a layer's cache. Queries are rotated in place; keys only on their way.
///
/// `qkv` is `[tokens, heads.columns()]`. The position is read from the device's memory when the kernel
/// runs; rows that would lie outside the cache are not stored.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit.
pub fn rope_and_store(
    device: &dyn Device,
    qkv: Span<'_, f32>,
    heads: Heads,
    rotations: Rotations<'_>,
    cache: Cache<'_>,
    first: Span<'_, u32>,
) -> Result<(), DeviceError> {
    heads.check();
    let tokens = heads.tokens(qkv);
    let context = cache.context(heads);
    let pairs = tokens * heads.head_dim / 2;
    assert_eq!(rotations.cos.len(), pairs, "cosines of {tokens} tokens");
    assert_eq!(rotations.sin.len(), pairs, "sines of {tokens} tokens");
    assert_eq!(first.len(), 1, "positions of the first token");
    if tokens == 0 {
        return Ok(());
    }
    let threads = qkv.len() / 2;
    assert!(threads < 1 << 31, "{} projections in a pass", qkv.len());
    let launch = Launch {
        grid: [threads.div_ceil(THREADS) as u32, 1, 1],
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    let name = match cache.is_half() {
        true => "rope_and_store_f16",
        false => "rope_and_store_f32",
    };
    let mut args = vec![
        qkv.on(device),
        rotations.cos.on(device),
        rotations.sin.on(device),
    ];
    args.extend(cache.args(device));
    args.extend([first.on(device), number(tokens)]);
    args.extend(heads.args());
    args.push(number(context));
    // SAFETY: a thread reads and writes one pair of one head of one token, inside `tokens` rows of `qkv`
    // and of the rotations, and in the cache below `context`, which is that of its length.
    unsafe { device.launch(kernel(name), launch, &args) }
}

/// Attention of the queries in `qkv`, the first at position `first[0]`, over a layer's cache, which holds
/// their keys and values already. `qkv` is `[tokens, heads.columns()]`, `y` `[tokens, heads.queries()]`.
///
/// A query's result is the same bit for bit whatever is computed beside it, and however large cache,
/// scratch and device are.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit, or `scratch` is for other heads or a smaller cache.
#[allow(
    clippy::too_many_arguments,
    reason = "one operation, every argument of its own type"
)]
pub fn attention(
    device: &dyn Device,
    qkv: Span<'_, f32>,
    heads: Heads,
    cache: Cache<'_>,
    mask: Mask,
    scale: f32,
    first: Span<'_, u32>,
    scratch: &Scratch,
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    heads.check();
    let tokens = heads.tokens(qkv);
    let context = cache.context(heads);
    assert_eq!(
        y.len(),
        tokens * heads.queries(),
        "results of {tokens} tokens"
    );
    assert_eq!(first.len(), 1, "positions of the first token");
    assert_eq!(
        (heads.heads, heads.head_dim),
        (scratch.heads, scratch.head_dim),
        "heads of the scratch"
    );
    if tokens == 0 {
        return Ok(());
    }
    let mut args = vec![qkv.on(device)];
    args.extend(cache.args(device));
    args.extend([first.on(device), number(tokens)]);
    args.extend(heads.args());
    args.push(number(context));
    args.extend(mask.args());
    args.push(Arg::F32(scale));

    let half = cache.is_half();
    let (kernel, launch) = if tokens <= scratch.tokens {
        let blocks = context.div_ceil(BLOCK);
        assert!(
            blocks <= scratch.blocks,
            "{context} positions, scratch for {} blocks of {BLOCK}",
            scratch.blocks
        );
        let rows = tokens * heads.group();
        let tiles = rows.div_ceil(TILE);
        let splits = scratch.places.div_ceil(heads.kv_heads * tiles).min(blocks);
        args.extend(scratch.parts().map(|part| part.on(device)));
        let launch = Launch {
            grid: [splits, heads.kv_heads, tiles].map(|n| n as u32),
            block: [THREADS as u32, 1, 1],
            shared: WARPS * rows.min(TILE) * heads.head_dim * size_of::<f32>(),
        };
        (heads.kernel("attend_decode", half), launch)
    } else {
        let launch = Launch {
            grid: [tokens.div_ceil(WARPS * TILE), heads.heads, 1].map(|n| n as u32),
            block: [THREADS as u32, 1, 1],
            shared: 0,
        };
        (heads.kernel("attend_prompt", half), launch)
    };
    args.push(y.on(device));
    // SAFETY: queries and results are read and written inside `tokens` rows; of the cache, of `context`
    // positions, nothing behind the last token or the context is read; partial results are of
    // `context / 256` blocks and the rows of `tokens`, for which the scratch has room, and its counts are
    // of fewer tiles than there are rows.
    unsafe { device.launch(kernel, launch, &args) }
}

/// Attention of every token with every token of its sequence. `qkv` holds sequences of `tokens` rows one
/// after the other, `[rows, heads.columns()]`; `y` is `[rows, heads.queries()]`.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the rows are not whole sequences of projected heads.
pub fn full_attention(
    device: &dyn Device,
    qkv: Span<'_, f32>,
    heads: Heads,
    tokens: usize,
    scale: f32,
    arithmetic: Arithmetic,
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    heads.check();
    let rows = heads.tokens(qkv);
    assert!(
        tokens > 0 && rows.is_multiple_of(tokens),
        "{rows} rows in sequences of {tokens}"
    );
    let sequences = rows / tokens;
    assert!(sequences <= 0xFFFF, "{sequences} sequences");
    assert_eq!(y.len(), rows * heads.queries(), "results of {rows} rows");
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [tokens.div_ceil(WARPS * TILE), heads.heads, sequences].map(|n| n as u32),
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    let mut args = vec![qkv.on(device), number(tokens)];
    args.extend(heads.args());
    args.extend([Arg::F32(scale), y.on(device)]);
    let kernel = heads.kernel("attend_full", arithmetic == Arithmetic::F16);
    // SAFETY: a thread block reads and writes inside the `tokens` rows of its sequence.
    unsafe { device.launch(kernel, launch, &args) }
}
