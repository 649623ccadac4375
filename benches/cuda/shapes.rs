//! What is timed, in numbers.

use phidias::engine::kernels::heads::{HeadOrder, Heads};

/// The shapes of a model, of the passes through it, and of what stands in its place in other models.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    /// Tokens of a pass: decoding, a few guesses at once, a short prompt, a long one.
    pub tokens: &'static [usize],
    pub hidden: usize,
    pub inner: usize,
    pub heads: Heads,
    pub vocab: usize,
    /// Tokens in the cache when a decoding step attends.
    pub depths: [usize; 2],
    /// Tokens of a prompt that attends to itself.
    pub prompts: [usize; 2],
    pub images: Images,
    pub experts: Experts,
    /// Bytes of weights, or of a cache, that are visited in turn: several times the second cache.
    pub working_set: usize,
}

/// The image encoder.
#[derive(Clone, Copy, Debug)]
pub struct Images {
    pub heads: Heads,
    /// Tokens of an image.
    pub tokens: usize,
    /// Images at once.
    pub count: [usize; 2],
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    pub count: usize,
    pub hidden: usize,
    pub inner: usize,
    /// Tokens of a pass.
    pub tokens: [usize; 2],
}

const fn heads(heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads: heads,
        head_dim,
        order: HeadOrder::Parts,
    }
}

impl Shapes {
    /// Phi-3.5-mini, the image encoder of Phi-3.5-vision and the experts of Phi-3.5-MoE.
    pub const MINI: Self = Self {
        tokens: &[1, 4, 16, 128, 512],
        hidden: 3072,
        inner: 8192,
        heads: heads(32, 96),
        vocab: 32_064,
        depths: [128, 4096],
        prompts: [512, 2048],
        images: Images {
            heads: heads(16, 64),
            tokens: 577,
            count: [1, 17],
        },
        experts: Experts {
            count: 16,
            hidden: 4096,
            inner: 6400,
            tokens: [1, 512],
        },
        // The second cache of an H100 has 50 MB.
        working_set: 400_000_000,
    };

    /// The same kernels, for few tokens and for many, in a time that the host device has.
    pub const SMALL: Self = Self {
        tokens: &[1, 4, 40],
        hidden: 96,
        inner: 160,
        heads: heads(3, 32),
        vocab: 496,
        depths: [20, 300],
        prompts: [20, 40],
        images: Images {
            heads: heads(2, 64),
            tokens: 33,
            count: [1, 2],
        },
        experts: Experts {
            count: 4,
            hidden: 64,
            inner: 96,
            tokens: [1, 40],
        },
        working_set: 0,
    };
}
