//! Rotary embedding, the cache, attention.
//!
//! The maths, the order of the sums and the work are at the head of `attention.cu`.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Memory, Source, Span};
use super::elementwise::{Output, Target};
use crate::heads::{HeadOrder, Heads};
use crate::mask::{BLOCK, BlockSparse, Mask};
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

/// Warps of a thread block.
const WARPS: usize = 8;
/// Queries of a warp.
const TILE: usize = 16;
/// Threads of a block.
const THREADS: usize = 32 * WARPS;
/// The widest head; its elements are a multiple of 8.
pub const HEAD_DIM: usize = 128;
/// Most tokens of a pass that is spread by ranges of the cache: what is new of it is in shared memory.
pub const FEW: usize = 8;
/// Columns that are quantized together: what a warp has of the results.
const QUANTS: usize = phidias_quant::BLOCK;

impl Heads {
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
        assert!(
            u32::try_from(qkv.len()).is_ok(),
            "{} projections in a pass, of 32 bits of addresses",
            qkv.len()
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
            Self::BlockSparse(BlockSparse {
                block,
                local_blocks,
                vert_stride,
                head_step,
            }) => {
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
        assert!(
            u32::try_from(keys).is_ok(),
            "{keys} elements of keys in a layer, of 32 bits of addresses"
        );
        keys / position
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

impl Rotations<'_> {
    /// # Panics
    /// When they are not of so many tokens.
    fn check(&self, heads: Heads, tokens: usize) {
        let pairs = tokens * heads.head_dim / 2;
        assert_eq!(self.cos.len(), pairs, "cosines of {tokens} tokens");
        assert_eq!(self.sin.len(), pairs, "sines of {tokens} tokens");
    }
}

/// In what attention without a cache computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Keys, values, queries and weights rounded to f16, sums f32: tensor cores.
    F16,
    /// f32 throughout.
    F32,
}

/// Room for the partial results of [`rope_store_attention`]. One serves all layers.
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

/// Decoding blocks that a multiprocessor holds at once, by their registers: more would only wait, most of them for
/// nothing, since a cache is seldom full.
fn at_once(head_dim: usize) -> usize {
    match head_dim {
        ..=32 => 3,
        33..=64 => 2,
        _ => 1,
    }
}

impl Scratch {
    /// For passes of up to `tokens` tokens with `context` positions allocated.
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    /// # Panics
    /// When the kernels cannot take the heads, or these are not [`FEW`].
    pub fn new(
        device: &Arc<dyn Device>,
        heads: Heads,
        context: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        heads.check();
        assert!(tokens <= FEW, "{tokens} tokens, at most {FEW} are few");
        let memory = Memory::new(device, Self::bytes(heads, context, tokens))?;
        let scratch = Self {
            heads: heads.heads,
            head_dim: heads.head_dim,
            blocks: context.div_ceil(BLOCK),
            tokens,
            places: at_once(heads.head_dim) * device.limits().multiprocessors as usize,
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

    /// Whether it is for passes of so many tokens.
    #[must_use]
    pub fn takes(&self, tokens: usize) -> bool {
        tokens <= self.tokens
    }

    /// Whether a pass can leave its results as a matrix takes them: where a block of 32 columns is of one head.
    #[must_use]
    pub fn gives_inputs(&self) -> bool {
        self.head_dim.is_multiple_of(QUANTS)
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
    rotations.check(heads, tokens);
    assert_eq!(first.len(), 1, "positions of the first token");
    if tokens == 0 {
        return Ok(());
    }
    let threads = qkv.len() / 2;
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
/// A query's result is the same bit for bit whatever is computed beside it, and however large the cache is.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit.
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
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    let pass = Pass::new(qkv, heads, cache, mask, scale, first);
    let tokens = pass.tokens;
    assert_eq!(
        y.len(),
        tokens * heads.queries(),
        "results of {tokens} tokens"
    );
    if tokens == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [tokens.div_ceil(WARPS * TILE), heads.heads, 1].map(|n| n as u32),
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    let mut args = pass.args(device);
    args.push(y.on(device));
    let kernel = heads.kernel("attend_prompt", cache.is_half());
    // SAFETY: queries and results are read and written inside `tokens` rows; of the cache, of `context`
    // positions, nothing behind the last token or the context is read.
    unsafe { device.launch(kernel, launch, &args) }
}

/// [`rope_and_store`] and [`attention`] of a few tokens in one launch, with the same results bit for bit, but
/// that queries in `qkv` stay as they are. The pass is spread over the device by ranges of the cache.
///
/// `y` is rows of f32, or where [`Scratch::gives_inputs`] as a matrix takes them. Neither the number of positions
/// that scratch and cache have nor the size of the device shows in it.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit, `scratch` is for other heads, fewer tokens or a smaller cache, or does not give
/// inputs; or where `qkv` and rotations do not begin at a multiple of 16 bytes.
#[allow(
    clippy::too_many_arguments,
    reason = "one operation, every argument of its own type"
)]
pub fn rope_store_attention<'m>(
    device: &dyn Device,
    qkv: Span<'_, f32>,
    heads: Heads,
    rotations: Rotations<'_>,
    cache: Cache<'_>,
    mask: Mask,
    scale: f32,
    first: Span<'_, u32>,
    scratch: &Scratch,
    y: impl Into<Output<'m>>,
) -> Result<(), DeviceError> {
    let pass = Pass::new(qkv, heads, cache, mask, scale, first);
    let (tokens, y) = (pass.tokens, y.into());
    rotations.check(heads, tokens);
    assert!(
        matches!(y, Output::Rows(_)) || scratch.gives_inputs(),
        "heads of {} as a matrix takes them",
        heads.head_dim
    );
    let y = Target::new(device, y, tokens as u32, heads.queries() as u32);
    assert_eq!(
        (heads.heads, heads.head_dim),
        (scratch.heads, scratch.head_dim),
        "heads of the scratch"
    );
    let blocks = pass.context.div_ceil(BLOCK);
    assert!(
        tokens <= scratch.tokens && blocks <= scratch.blocks,
        "{tokens} tokens, {blocks} blocks of {BLOCK} positions, scratch for {} and {}",
        scratch.tokens,
        scratch.blocks
    );
    if tokens == 0 {
        return Ok(());
    }
    let rows = tokens * heads.group();
    let tiles = rows.div_ceil(TILE);
    // One wave of thread blocks, no second one that is nearly empty.
    let splits = (scratch.places / (heads.kv_heads * tiles))
        .min(blocks)
        .max(1);
    let element = if cache.is_half() {
        size_of::<f16>()
    } else {
        size_of::<f32>()
    };
    let rows = rows.min(TILE);
    // What each warp gives, and the pass's own rows: queries, keys and values.
    let shared = WARPS * rows * size_of::<f32>() + (rows + 2 * tokens) * element;
    let launch = Launch {
        grid: [splits, heads.kv_heads, tiles].map(|n| n as u32),
        block: [THREADS as u32, 1, 1],
        shared: shared * heads.head_dim,
    };
    let mut args = pass.args(device);
    args.extend([rotations.cos.on(device), rotations.sin.on(device)]);
    for read in [args[0], args[args.len() - 2], args[args.len() - 1]] {
        assert!(
            matches!(read, Arg::Address(at) if at.is_multiple_of(16)),
            "four values at once from {read:?}"
        );
    }
    args.extend(scratch.parts().map(|part| part.on(device)));
    args.extend([y.values, y.heads, number(y.form), Arg::I32(y.zero)]);
    let kernel = heads.kernel("attend_decode", cache.is_half());
    // SAFETY: `qkv`, rotations and results are read and written inside `tokens` rows; the cache, of `context`
    // positions, is read before `first` and written from there to the last token, nothing behind the context;
    // partial results are of `context / 256` blocks and the rows of `tokens`, for which the scratch has
    // room, and its counts are of fewer tiles than there are rows.
    unsafe { device.launch(kernel, launch, &args) }
}

/// What both kinds of attention over a cache begin with.
struct Pass<'m> {
    qkv: Span<'m, f32>,
    heads: Heads,
    cache: Cache<'m>,
    mask: Mask,
    scale: f32,
    first: Span<'m, u32>,
    tokens: usize,
    context: usize,
}

impl<'m> Pass<'m> {
    /// # Panics
    /// When the shapes do not fit.
    fn new(
        qkv: Span<'m, f32>,
        heads: Heads,
        cache: Cache<'m>,
        mask: Mask,
        scale: f32,
        first: Span<'m, u32>,
    ) -> Self {
        heads.check();
        assert_eq!(first.len(), 1, "positions of the first token");
        Self {
            tokens: heads.tokens(qkv),
            context: cache.context(heads),
            qkv,
            heads,
            cache,
            mask,
            scale,
            first,
        }
    }

    /// `LAYER` of `attention.cu`
    fn args(&self, device: &dyn Device) -> Vec<Arg> {
        let mut args = vec![self.qkv.on(device)];
        args.extend(self.cache.args(device));
        args.extend([self.first.on(device), number(self.tokens)]);
        args.extend(self.heads.args());
        args.push(number(self.context));
        args.extend(self.mask.args());
        args.push(Arg::F32(self.scale));
        args
    }
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

#[cfg(test)]
mod tests {
    use super::super::check::elementwise::in_every_form;
    use super::super::check::{Random, each_device};
    use super::*;
    use crate::cpu::{Isa, Kernels};

    /// Half a unit in the last place of 1, in f32 and in f16.
    const U: f64 = 1.0 / (1u64 << 24) as f64;
    const HALF_U: f64 = 1.0 / 2048.0;

    /// What an attention test works on: projections, and a cache that holds all their keys and values.
    #[derive(Clone)]
    struct Scene {
        heads: Heads,
        half: bool,
        mask: Mask,
        scale: f32,
        context: usize,
        /// `[tokens, columns]`; the first token is at position 0.
        qkv: Vec<f32>,
        /// `[tokens, head_dim / 2]`
        cos: Vec<f32>,
        sin: Vec<f32>,
        /// `qkv`, its queries and keys rotated by the CPU.
        rotated: Vec<f32>,
        /// `[kv_heads, context, head_dim]`, as stored.
        keys: Vec<f32>,
        values: Vec<f32>,
    }

    /// Keys and values on a device, in half precision or not.
    fn cache<'m>(half: bool, keys: &'m Memory, values: &'m Memory) -> Cache<'m> {
        match half {
            true => Cache::F16 {
                keys: keys.span(),
                values: values.span(),
            },
            false => Cache::F32 {
                keys: keys.span(),
                values: values.span(),
            },
        }
    }

    /// A head in a row of projections.
    #[derive(Clone, Copy)]
    enum Part {
        Query(usize),
        Key(usize),
        Value(usize),
    }

    /// Where it begins.
    fn column(heads: Heads, part: Part) -> usize {
        let (group, kv_heads) = (heads.group(), heads.kv_heads);
        let slot = match (heads.order, part) {
            (HeadOrder::Parts, Part::Query(head)) => head,
            (HeadOrder::Parts, Part::Key(kv_head)) => heads.heads + kv_head,
            (HeadOrder::Parts, Part::Value(kv_head)) => heads.heads + kv_heads + kv_head,
            (HeadOrder::Groups, Part::Query(head)) => head + 2 * (head / group),
            (HeadOrder::Groups, Part::Key(kv_head)) => kv_head * (group + 2) + group,
            (HeadOrder::Groups, Part::Value(kv_head)) => kv_head * (group + 2) + group + 1,
        };
        slot * heads.head_dim
    }

    /// What a pass works on, on a device.
    struct OnDevice {
        heads: Heads,
        half: bool,
        mask: Mask,
        scale: f32,
        qkv: Memory,
        cos: Memory,
        sin: Memory,
        keys: Memory,
        values: Memory,
        first: Memory,
    }

    impl OnDevice {
        fn cache(&self) -> Cache<'_> {
            cache(self.half, &self.keys, &self.values)
        }

        fn rotations(&self) -> Rotations<'_> {
            Rotations {
                cos: self.cos.span(),
                sin: self.sin.span(),
            }
        }

        /// In two launches.
        fn two(&self, device: &dyn Device, y: Span<'_, f32>) -> Result<(), DeviceError> {
            let (qkv, heads, first) = (self.qkv.span(), self.heads, self.first.span());
            rope_and_store(device, qkv, heads, self.rotations(), self.cache(), first)?;
            let (cache, mask, scale) = (self.cache(), self.mask, self.scale);
            attention(device, qkv, heads, cache, mask, scale, first, y)
        }

        /// In one.
        fn one<'m>(
            &self,
            device: &dyn Device,
            scratch: &Scratch,
            y: impl Into<Output<'m>>,
        ) -> Result<(), DeviceError> {
            rope_store_attention(
                device,
                self.qkv.span(),
                self.heads,
                self.rotations(),
                self.cache(),
                self.mask,
                self.scale,
                self.first.span(),
                scratch,
                y,
            )
        }

        /// Bits of keys and values.
        fn stored(&self) -> Result<[Vec<u32>; 2], DeviceError> {
            let bits = |memory: &Memory| -> Result<Vec<u32>, DeviceError> {
                Ok(match self.half {
                    true => {
                        let all = memory.span::<u16>().to_vec()?;
                        all.into_iter().map(u32::from).collect()
                    }
                    false => memory.span::<u32>().to_vec()?,
                })
            };
            Ok([bits(&self.keys)?, bits(&self.values)?])
        }
    }

    impl Scene {
        fn new(heads: Heads, half: bool, mask: Mask, tokens: usize, context: usize) -> Self {
            let (mut random, d) = (Random(tokens as u64), heads.head_dim);
            let mut qkv = random.values(tokens * heads.columns(), 1.0);
            let angles = random.values(tokens * d / 2, 3.0);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            for row in qkv.chunks_exact_mut(heads.columns()) {
                for head in 0..heads.heads {
                    let query = &mut row[column(heads, Part::Query(head))..][..d];
                    query.iter_mut().for_each(|v| *v *= 8.0);
                }
            }
            let mut rotated = qkv.clone();
            let queries = (0..heads.heads).map(Part::Query);
            let turned: Vec<_> = queries
                .chain((0..heads.kv_heads).map(Part::Key))
                .map(|part| column(heads, part))
                .collect();
            let scalar = Kernels::for_isa(Isa::Scalar).expect("everywhere");
            for (t, row) in rotated.chunks_exact_mut(heads.columns()).enumerate() {
                let own = t * d / 2..(t + 1) * d / 2;
                for at in &turned {
                    scalar.rope(&mut row[*at..][..d], &cos[own.clone()], &sin[own.clone()]);
                }
            }
            // What is behind the tokens is NaN: nobody may use it.
            let stored = |part: fn(usize) -> Part| -> Vec<f32> {
                let mut all = vec![f32::NAN; heads.kv_heads * context * d];
                for (kv_head, head) in all.chunks_exact_mut(context * d).enumerate() {
                    let rows = rotated.chunks_exact(heads.columns());
                    for (to, row) in head.chunks_exact_mut(d).zip(rows) {
                        let from = &row[column(heads, part(kv_head))..];
                        for (to, v) in to.iter_mut().zip(from) {
                            *to = match half {
                                true => f16::from_f32(*v).to_f32(),
                                false => *v,
                            };
                        }
                    }
                }
                all
            };
            Self {
                heads,
                half,
                mask,
                scale: 1.0 / (d as f32).sqrt(),
                context,
                keys: stored(Part::Key),
                values: stored(Part::Value),
                qkv,
                cos,
                sin,
                rotated,
            }
        }

        fn tokens(&self) -> usize {
            self.qkv.len() / self.heads.columns()
        }

        /// The same with another context allocated.
        fn with_context(&self, context: usize) -> Self {
            let d = self.heads.head_dim;
            let keep = self.context.min(context) * d;
            let resize = |all: &[f32]| -> Vec<f32> {
                let heads = all.chunks_exact(self.context * d).map(|head| {
                    let mut head = head[..keep].to_vec();
                    head.resize(context * d, f32::NAN);
                    head
                });
                heads.flatten().collect()
            };
            Self {
                context,
                keys: resize(&self.keys),
                values: resize(&self.values),
                ..self.clone()
            }
        }

        /// The same with nothing in the cache from a position on.
        fn before(&self, position: usize) -> Self {
            let mut now = self.clone();
            for all in [&mut now.keys, &mut now.values] {
                for head in all.chunks_exact_mut(self.context * self.heads.head_dim) {
                    let cached = (position * self.heads.head_dim).min(head.len());
                    head[cached..].fill(f32::NAN);
                }
            }
            now
        }

        fn query(&self, token: usize, head: usize) -> &[f32] {
            let at = column(self.heads, Part::Query(head));
            &self.rotated[token * self.heads.columns() + at..][..self.heads.head_dim]
        }

        /// The keys that a query sees, from the definition.
        fn seen(&self, head: usize, position: usize) -> Vec<usize> {
            let sees = |key: &usize| match self.mask {
                Mask::Causal { window } => window.is_none_or(|w| position - key < w),
                Mask::BlockSparse(BlockSparse {
                    block,
                    local_blocks,
                    vert_stride,
                    head_step,
                }) => {
                    let (query, key) = (position / block, key / block);
                    query - key < local_blocks
                        || (key + head * head_step + 1).is_multiple_of(vert_stride)
                }
            };
            (0..=position).filter(sees).collect()
        }

        /// Exact attention of one query over `seen`, and by how much a kernel may miss it.
        ///
        /// A score is off by `e` times `scale * sum |q_i k_i|` (in f16 that of the rounded queries, `2^-11`,
        /// beside the sum's `gamma(d)`), and by a few units of itself and of its distance from the
        /// maximum; so a weight is relatively, and a quotient of weights by twice that. Rounded weights
        /// add `2^-11` of what they weigh, or `2^-25` where they are subnormal.
        fn exact(&self, token: usize, head: usize, seen: &[usize]) -> (Vec<f64>, f64) {
            let d = self.heads.head_dim;
            let kv_head = head / self.heads.group();
            let row = |all: &[f32], j: usize| -> Vec<f64> {
                let at = (kv_head * self.context + j) * d;
                all[at..at + d].iter().map(|v| f64::from(*v)).collect()
            };
            let q: Vec<f64> = self
                .query(token, head)
                .iter()
                .map(|v| f64::from(*v))
                .collect();
            let scale = f64::from(self.scale);
            let dot = |k: &[f64], f: fn(f64) -> f64| -> f64 {
                q.iter().zip(k).map(|(q, k)| f(q * k)).sum::<f64>() * scale
            };
            let keys: Vec<_> = seen.iter().map(|j| row(&self.keys, *j)).collect();
            let scores: Vec<f64> = keys.iter().map(|k| dot(k, |x| x)).collect();
            let size = keys.iter().map(|k| dot(k, f64::abs)).fold(0.0, f64::max);
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut y = vec![0.0; d];
            let mut largest = 0.0f64;
            for (j, weight) in seen.iter().zip(&weights) {
                for (y, v) in y.iter_mut().zip(row(&self.values, *j)) {
                    *y += weight / sum * v;
                    largest = largest.max(v.abs());
                }
            }
            let terms = (d + seen.len() + 40) as f64 * U;
            let (of_queries, of_weights) = match self.half {
                true => (HALF_U, HALF_U + seen.len() as f64 * HALF_U / 16384.0),
                false => (0.0, 0.0),
            };
            let off = 2.0 * ((of_queries + terms) * size + terms) + of_weights;
            (y, off * largest)
        }

        /// A pass of some tokens with the cache as it is.
        fn upload(
            &self,
            device: &Arc<dyn Device>,
            tokens: std::ops::Range<usize>,
        ) -> Result<OnDevice, DeviceError> {
            let halves = |v: &[f32]| v.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
            let stored = |v: &[f32]| match self.half {
                true => Memory::from_slice(device, &halves(v)),
                false => Memory::from_slice(device, v),
            };
            let rows = |all: &[f32], columns: usize| {
                Memory::from_slice(device, &all[tokens.start * columns..tokens.end * columns])
            };
            let pairs = self.heads.head_dim / 2;
            Ok(OnDevice {
                heads: self.heads,
                half: self.half,
                mask: self.mask,
                scale: self.scale,
                qkv: rows(&self.qkv, self.heads.columns())?,
                cos: rows(&self.cos, pairs)?,
                sin: rows(&self.sin, pairs)?,
                keys: stored(&self.keys)?,
                values: stored(&self.values)?,
                first: Memory::from_slice(device, &[tokens.start as u32])?,
            })
        }

        /// Attention of tokens `from..to` in passes of `cut` tokens; those of up to `few` are done in one launch.
        /// What a pass does not have yet is not in the cache: it is NaN, and so is what it does not see.
        fn attend(
            &self,
            device: &Arc<dyn Device>,
            from: usize,
            cut: usize,
            few: usize,
        ) -> Result<Vec<f32>, DeviceError> {
            let scratch = Scratch::new(device, self.heads, self.context, few)?;
            let mut y = Vec::new();
            for start in (from..self.tokens()).step_by(cut) {
                let end = self.tokens().min(start + cut);
                let at = |positions: usize| {
                    let mut now = self.before(positions);
                    now.forget_unseen(start..end);
                    now
                };
                let pass = at(start).upload(device, start..end)?;
                let out = Memory::from_slice(
                    device,
                    &vec![f32::NAN; (end - start) * self.heads.queries()],
                )?;
                match scratch.takes(end - start) {
                    true => pass.one(&**device, &scratch, out.span::<f32>())?,
                    false => pass.two(&**device, out.span())?,
                }
                let after = at(end).upload(device, start..end)?.stored()?;
                assert!(pass.stored()? == after, "the cache behind {start}..{end}");
                y.extend(out.span::<f32>().to_vec()?);
            }
            Ok(y)
        }

        /// Whole steps of 32 positions that no head of a KV head sees become NaN: they must not be used.
        fn forget_unseen(&mut self, positions: std::ops::Range<usize>) {
            let (d, group) = (self.heads.head_dim, self.heads.group());
            for kv_head in 0..self.heads.kv_heads {
                let mut used = vec![false; self.context.next_multiple_of(32)];
                for head in kv_head * group..(kv_head + 1) * group {
                    for position in positions.clone() {
                        for key in self.seen(head, position) {
                            used[key / 32 * 32..][..32].fill(true);
                        }
                    }
                }
                for (j, _) in used
                    .iter()
                    .take(self.context)
                    .enumerate()
                    .filter(|(_, u)| !**u)
                {
                    let at = (kv_head * self.context + j) * d;
                    self.keys[at..at + d].fill(f32::NAN);
                    self.values[at..at + d].fill(f32::NAN);
                }
            }
        }

        /// Compares with exact attention.
        fn check(&self, from: usize, y: &[f32], what: &str) {
            let d = self.heads.head_dim;
            assert_eq!(y.len(), (self.tokens() - from) * self.heads.queries());
            for (i, got) in y.chunks_exact(d).enumerate() {
                let (token, head) = (from + i / self.heads.heads, i % self.heads.heads);
                let (want, bound) = self.exact(token, head, &self.seen(head, token));
                for (e, (got, want)) in got.iter().zip(&want).enumerate() {
                    let off = (f64::from(*got) - want).abs();
                    assert!(
                        off <= bound,
                        "{what}: token {token}, head {head}, element {e}: {got} for {want}, \
                         off by {off:e} of {bound:e}"
                    );
                }
            }
        }
    }

    fn heads(heads: usize, kv_heads: usize, head_dim: usize, order: HeadOrder) -> Heads {
        Heads {
            heads,
            kv_heads,
            head_dim,
            order,
        }
    }

    const CAUSAL: Mask = Mask::Causal { window: None };
    const SPARSE: Mask = Mask::BlockSparse(BlockSparse {
        block: 32,
        local_blocks: 2,
        vert_stride: 4,
        head_step: 1,
    });

    /// Heads of every width, groups of several sizes, every mask; prompts that end inside a block.
    fn scenes(half: bool) -> Vec<Scene> {
        let scene = |h, mask, tokens| Scene::new(h, half, mask, tokens, tokens + 5);
        let window = |w| Mask::Causal { window: Some(w) };
        vec![
            scene(heads(2, 2, 96, HeadOrder::Parts), CAUSAL, 37),
            scene(heads(4, 1, 128, HeadOrder::Parts), window(20), 70),
            scene(heads(8, 2, 32, HeadOrder::Groups), SPARSE, 200),
            scene(heads(2, 1, 8, HeadOrder::Parts), window(270), 301),
            scene(heads(1, 1, 48, HeadOrder::Groups), CAUSAL, 290),
            scene(heads(6, 2, 16, HeadOrder::Parts), window(1), 34),
            scene(
                heads(2, 2, 64, HeadOrder::Groups),
                Mask::BlockSparse(BlockSparse {
                    block: 16,
                    local_blocks: 1,
                    vert_stride: 5,
                    head_step: 2,
                }),
                150,
            ),
        ]
    }

    #[test]
    fn prompts_are_within_their_bound_of_exact_attention() {
        each_device(|device| {
            for (i, scene) in [true, false].into_iter().flat_map(scenes).enumerate() {
                let y = scene.attend(device, 0, scene.tokens(), 0)?;
                scene.check(0, &y, &format!("scene {i}"));
            }
            Ok(())
        });
    }

    #[test]
    fn decode_is_within_its_bound_of_exact_attention() {
        each_device(|device| {
            for (i, scene) in [true, false].into_iter().flat_map(scenes).enumerate() {
                let from = scene.tokens() - 5;
                for cut in [1, 3] {
                    let y = scene.attend(device, from, cut, 8)?;
                    scene.check(from, &y, &format!("scene {i}, {cut} tokens a pass"));
                }
            }
            Ok(())
        });
    }

    /// One key more or less breaks the bounds.
    #[test]
    fn bounds_notice_a_window_off_by_one() {
        for half in [true, false] {
            let h = heads(1, 1, 96, HeadOrder::Parts);
            let mut scene = Scene::new(h, half, Mask::Causal { window: Some(20) }, 37, 37);
            // Scores near 0: every key weighs about a twentieth.
            scene.rotated.iter_mut().for_each(|v| *v /= 8.0);
            let seen = scene.seen(0, 36);
            let (right, bound) = scene.exact(36, 0, &seen);
            for wrong in [&seen[1..], &seen[..seen.len() - 1]] {
                let (wrong, _) = scene.exact(36, 0, wrong);
                assert!(right.iter().zip(&wrong).any(|(r, w)| (r - w).abs() > bound));
            }
        }
    }

    /// However a prompt is cut, whatever is allocated, whichever kernel runs.
    #[test]
    fn every_cut_and_context_gives_the_same_bits() {
        each_device(|device| {
            for (i, scene) in [true, false].into_iter().flat_map(scenes).enumerate() {
                let from = scene.tokens() - 21;
                let whole = scene.attend(device, from, 21, 0)?;
                let large = scene.with_context(scene.context + 700);
                for (scene, cut, split) in [
                    (&scene, 1, 1),
                    (&scene, 8, 8),
                    (&scene, 5, 0),
                    (&large, 4, 4),
                    (&large, 21, 0),
                ] {
                    let y = scene.attend(device, from, cut, split)?;
                    for (at, (got, want)) in y.iter().zip(&whole).enumerate() {
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "scene {i}, {cut} a pass, decode up to {split}, {}: {got} for {want} at {at}",
                            scene.context
                        );
                    }
                }
            }
            Ok(())
        });
    }

    /// Rotation, storing and attention in one launch leave what they leave in two: every number of tokens, groups
    /// that are several tiles, passes across the borders of steps and blocks and the end of the cache.
    #[test]
    fn one_launch_gives_the_bits_of_two() {
        const BLOCKS: Mask = Mask::BlockSparse(BlockSparse {
            block: 16,
            local_blocks: 1,
            vert_stride: 3,
            head_step: 1,
        });
        let window = |w| Mask::Causal { window: Some(w) };
        let (parts, groups) = (HeadOrder::Parts, HeadOrder::Groups);
        each_device(|device| {
            for (i, (h, mask, start, context)) in [
                (heads(2, 2, 96, parts), CAUSAL, 252, 300),
                (heads(8, 2, 32, groups), CAUSAL, 250, 300),
                (heads(3, 1, 64, groups), window(9), 253, 270),
                (heads(5, 1, 40, parts), BLOCKS, 254, 264),
                (heads(4, 2, 128, parts), window(300), 509, 600),
                (heads(2, 1, 8, groups), SPARSE, 28, 40),
                // The first pass, and one of which a part, or all, is outside the cache.
                (heads(4, 2, 24, groups), window(3), 0, 8),
                (heads(4, 2, 48, parts), CAUSAL, 253, 256),
                (heads(2, 2, 32, groups), CAUSAL, 30, 31),
                (heads(2, 2, 32, parts), CAUSAL, 32, 32),
            ]
            .into_iter()
            .enumerate()
            {
                for (half, tokens) in [true, false]
                    .into_iter()
                    .flat_map(|half| (1..=FEW).map(move |tokens| (half, tokens)))
                {
                    let room = context.max(start + tokens);
                    let scene = Scene::new(h, half, mask, start + tokens, room);
                    let before = scene.with_context(context).before(start);
                    let [one, two] = [(); 2].map(|()| before.upload(device, start..start + tokens));
                    let (one, two) = (one?, two?);
                    let mut scratch = Scratch::new(device, h, context, tokens)?;
                    // Each block of positions a thread block, and one for all.
                    scratch.places = if tokens % 2 == 0 { 1 } else { 1000 };
                    let [of_one, of_two] =
                        [(); 2].map(|()| Memory::zeroed(device, tokens * h.queries() * 4));
                    let (of_one, of_two) = (of_one?, of_two?);
                    one.one(&**device, &scratch, of_one.span::<f32>())?;
                    two.two(&**device, of_two.span())?;
                    let what = format!("case {i}, {tokens} tokens, half: {half}");
                    assert!(one.stored()? == two.stored()?, "{what}: the cache");
                    assert_eq!(
                        one.qkv.span::<f32>().to_vec()?,
                        scene.qkv[start * h.columns()..]
                    );
                    // Nobody asks for tokens that have no place.
                    let inside = tokens.min(context - start) * h.queries();
                    let bits = |y: &Memory| -> Result<Vec<u32>, DeviceError> {
                        y.span().slice(..inside).to_vec()
                    };
                    assert!(bits(&of_one)? == bits(&of_two)?, "{what}: results");
                }
            }
            Ok(())
        });
    }

    /// The number of thread blocks that share the cache does not show.
    #[test]
    fn splits_do_not_show() {
        each_device(|device| {
            let h = heads(2, 1, 32, HeadOrder::Parts);
            let scene = Scene::new(h, true, CAUSAL, 1300, 1400);
            let pass = scene.before(1299).upload(device, 1299..1300)?;
            let mut scratch = Scratch::new(device, h, 1400, 1)?;
            let mut results = Vec::new();
            for places in [1, 2, 4, 1000] {
                scratch.places = places;
                let y = Memory::zeroed(device, h.queries() * 4)?;
                pass.one(&**device, &scratch, y.span::<f32>())?;
                results.push(y.span::<f32>().to_vec()?);
            }
            scene.check(1299, &results[0], "split");
            assert!(results.iter().all(|y| *y == results[0]));
            Ok(())
        });
    }

    /// The same values as in rows of f32, rounded and quantized as the CPU does; also where they are not finite.
    #[test]
    fn results_of_decoding_become_what_a_matrix_takes() {
        each_device(|device| {
            let window = Mask::Causal { window: Some(20) };
            let mut scenes = Vec::new();
            for half in [true, false] {
                // One block of positions, and several; heads of one block of columns, and of more.
                for (h, mask, tokens) in [
                    (heads(4, 1, 128, HeadOrder::Parts), window, 70),
                    (heads(8, 2, 32, HeadOrder::Groups), SPARSE, 200),
                    (heads(2, 2, 96, HeadOrder::Parts), CAUSAL, 600),
                ] {
                    scenes.push(Scene::new(h, half, mask, tokens, tokens + 5));
                }
            }
            let infinite = scenes.last_mut().expect("a scene");
            infinite.values[40] = f32::INFINITY;
            for scene in &scenes {
                let (h, last) = (scene.heads, scene.tokens());
                for tokens in [1, 3] {
                    let start = last - tokens;
                    let pass = scene.upload(device, start..last)?;
                    let scratch = Scratch::new(device, h, scene.context, 3)?;
                    assert!(scratch.takes(tokens) && scratch.gives_inputs());
                    let y = in_every_form(device, (tokens, h.queries()), |y| {
                        pass.one(&**device, &scratch, y)
                    })?;
                    let finite = y.iter().all(|v| v.is_finite());
                    assert_eq!(
                        finite,
                        scene
                            .values
                            .iter()
                            .all(|v| *v < f32::INFINITY || v.is_nan())
                    );
                    if finite {
                        scene.check(start, &y, &format!("{tokens} tokens in every form"));
                    }
                }
            }
            // Heads in whose blocks of columns another begins, and a pass of too many tokens.
            let scratch = Scratch::new(device, heads(2, 2, 48, HeadOrder::Parts), 40, 3)?;
            assert!(!scratch.gives_inputs() && !scratch.takes(4));
            Ok(())
        });
    }

    /// A step of decoding, recorded once and replayed as positions move on.
    #[test]
    fn a_recorded_step_moves_on_with_the_position() {
        each_device(|device| {
            let h = heads(4, 2, 32, HeadOrder::Groups);
            let scene = Scene::new(h, true, Mask::Causal { window: Some(100) }, 262, 300);
            let pass = scene.before(250).upload(device, 250..251)?;
            let y = Memory::zeroed(device, h.queries() * 4)?;
            let scratch = Scratch::new(device, h, 300, 1)?;
            let step = device.record(&mut || pass.one(&**device, &scratch, y.span::<f32>()))?;
            let mut all = Vec::new();
            for t in 250..262 {
                for (to, rows, columns) in [
                    (&pass.qkv, &scene.qkv, h.columns()),
                    (&pass.cos, &scene.cos, h.head_dim / 2),
                    (&pass.sin, &scene.sin, h.head_dim / 2),
                ] {
                    to.span().upload(&rows[t * columns..][..columns])?;
                }
                pass.first.span().upload(&[t as u32])?;
                step.replay()?;
                all.extend(y.span::<f32>().to_vec()?);
            }
            assert!(pass.stored()? == scene.upload(device, 261..262)?.stored()?);
            scene.check(250, &all, "replayed");
            Ok(())
        });
    }

    #[test]
    fn full_attention_is_within_its_bound() {
        each_device(|device| {
            for (arithmetic, head_dim) in [
                (Arithmetic::F16, 64),
                (Arithmetic::F16, 16),
                (Arithmetic::F32, 64),
            ] {
                let (tokens, sequences, half) = (140, 2, arithmetic == Arithmetic::F16);
                let h = heads(2, 2, head_dim, HeadOrder::Parts);
                let mut random = Random(5);
                let qkv = random.values(tokens * sequences * h.columns(), 2.0);
                let on_device = Memory::from_slice(device, &qkv)?;
                let y = Memory::zeroed(device, tokens * sequences * h.queries() * 4)?;
                let scale = 1.0 / (head_dim as f32).sqrt();
                full_attention(
                    &**device,
                    on_device.span(),
                    h,
                    tokens,
                    scale,
                    arithmetic,
                    y.span(),
                )?;
                let y = y.span::<f32>().to_vec()?;
                for (sequence, (qkv, y)) in (qkv.chunks_exact(tokens * h.columns()))
                    .zip(y.chunks_exact(tokens * h.queries()))
                    .enumerate()
                {
                    // The same as a scene whose queries see everything.
                    let part = |from: usize| -> Vec<f32> {
                        let of = |(kv_head, t): (usize, usize)| {
                            let at = t * h.columns() + from + kv_head * head_dim;
                            qkv[at..at + head_dim].iter().map(|v| match half {
                                true => f16::from_f32(*v).to_f32(),
                                false => *v,
                            })
                        };
                        let rows = (0..h.kv_heads).flat_map(|kv| (0..tokens).map(move |t| (kv, t)));
                        rows.flat_map(of).collect()
                    };
                    let scene = Scene {
                        heads: h,
                        half,
                        mask: CAUSAL,
                        scale,
                        context: tokens,
                        qkv: Vec::new(),
                        cos: Vec::new(),
                        sin: Vec::new(),
                        rotated: qkv.to_vec(),
                        keys: part(h.queries()),
                        values: part(h.queries() + h.kv_heads * head_dim),
                    };
                    let all: Vec<usize> = (0..tokens).collect();
                    for (i, got) in y.chunks_exact(head_dim).enumerate() {
                        let (want, bound) = scene.exact(i / 2, i % 2, &all);
                        for (got, want) in got.iter().zip(&want) {
                            assert!(
                                (f64::from(*got) - want).abs() <= bound,
                                "{arithmetic:?}, sequence {sequence}, row {i}: {got} for {want}"
                            );
                        }
                    }
                }
            }
            Ok(())
        });
    }

    /// The CPU's rotation, bit for bit, and its rounding to f16.
    #[test]
    fn rotation_and_cache_are_the_cpus() {
        let scalar = Kernels::for_isa(Isa::Scalar).expect("everywhere");
        each_device(|device| {
            for (order, half) in [
                (HeadOrder::Parts, true),
                (HeadOrder::Groups, true),
                (HeadOrder::Parts, false),
                (HeadOrder::Groups, false),
            ] {
                let (h, tokens, context, start) = (heads(4, 2, 24, order), 5, 11, 8);
                let mut random = Random(3);
                let qkv = random.values(tokens * h.columns(), 4.0);
                let angles = random.values(tokens * 12, 3.0);
                let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
                let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
                let bytes = h.kv_heads * context * h.head_dim * if half { 2 } else { 4 };
                let (keys, values) = (
                    Memory::zeroed(device, bytes)?,
                    Memory::zeroed(device, bytes)?,
                );
                let cache = cache(half, &keys, &values);
                let on_device = Memory::from_slice(device, &qkv)?;
                let (cos_there, sin_there) = (
                    Memory::from_slice(device, &cos)?,
                    Memory::from_slice(device, &sin)?,
                );
                let rotations = Rotations {
                    cos: cos_there.span(),
                    sin: sin_there.span(),
                };
                let first = Memory::from_slice(device, &[start as u32])?;
                rope_and_store(
                    &**device,
                    on_device.span(),
                    h,
                    rotations,
                    cache,
                    first.span(),
                )?;

                let mut rows = qkv.clone();
                let mut want = [vec![0.0f32; bytes], vec![0.0f32; bytes]].map(|mut v| {
                    v.truncate(h.kv_heads * context * h.head_dim);
                    v
                });
                for (t, row) in rows.chunks_exact_mut(h.columns()).enumerate() {
                    for (slot, head) in row.chunks_exact_mut(h.head_dim).enumerate() {
                        let (kv_head, kind) = match order {
                            HeadOrder::Parts if slot < 4 => (0, 0),
                            HeadOrder::Parts => ((slot - 4) % 2, 1 + (slot - 4) / 2),
                            HeadOrder::Groups => (slot / 4, [0, 0, 1, 2][slot % 4]),
                        };
                        let before = head.to_vec();
                        if kind < 2 {
                            let at = t * 12;
                            scalar.rope(head, &cos[at..at + 12], &sin[at..at + 12]);
                        }
                        if kind > 0 {
                            if start + t < context {
                                let at = (kv_head * context + start + t) * h.head_dim;
                                want[kind - 1][at..at + h.head_dim].copy_from_slice(head);
                            }
                            head.copy_from_slice(&before);
                        }
                    }
                }
                assert_eq!(on_device.span::<f32>().to_vec()?, rows, "queries");
                for (memory, want) in [keys, values].iter().zip(want) {
                    match half {
                        true => {
                            let want: Vec<_> = want.iter().map(|v| f16::from_f32(*v)).collect();
                            assert_eq!(memory.span::<f16>().to_vec()?, want, "{order:?}");
                        }
                        false => assert_eq!(memory.span::<f32>().to_vec()?, want, "{order:?}"),
                    }
                }
            }
            Ok(())
        });
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let refused = |heads: Heads, expected: &str| {
            let message = std::panic::catch_unwind(|| heads.check()).unwrap_err();
            let message = message
                .downcast_ref::<String>()
                .cloned()
                .unwrap_or_default();
            assert!(message.contains(expected), "{message}");
        };
        refused(heads(6, 4, 32, HeadOrder::Parts), "6 heads for 4");
        refused(heads(4, 4, 136, HeadOrder::Parts), "heads of 136");
        refused(heads(4, 4, 20, HeadOrder::Parts), "heads of 20");
        let mask = Mask::BlockSparse(BlockSparse {
            block: 48,
            local_blocks: 1,
            vert_stride: 1,
            head_step: 0,
        });
        assert!(std::panic::catch_unwind(|| mask.args()).is_err());
    }
}
