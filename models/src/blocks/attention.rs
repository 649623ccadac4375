//! Causal self-attention with rotary positions, grouped heads and an optional sliding window.

use phidias_engine::backend::{Heads, Input, Mask, Ops, Rotations};
use phidias_engine::kv_cache::KvCache;
use phidias_engine::tensor::{Buffer, Linear, Matrix};

/// Self-attention.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[(heads + 2 kv_heads) * head_dim, hidden]` together: queries, keys and values, in one matrix or
    /// in three.
    pub qkv_proj: Vec<Linear>,
    /// `[hidden, heads * head_dim]`
    pub o_proj: Linear,
    /// How the outputs of `qkv_proj` divide.
    pub heads: Heads,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Factor on the scores.
    pub scale: f32,
}

/// Where in the sequence a chunk of tokens stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Layer of the cache.
    pub layer: usize,
    /// Position of the first token.
    pub first: usize,
    /// Rotations of the tokens.
    pub rotations: &'a Rotations,
}

/// What attention works with, kept from layer to layer.
#[derive(Debug, Default)]
pub struct Scratch {
    qkv: Buffer,
    heads: Buffer,
    input: Input,
}

impl Attention {
    /// A matrix that its input is made for.
    #[must_use]
    pub fn matrix(&self) -> &Matrix {
        &self.qkv_proj[0].weight
    }

    /// `y = attention(x)`, both `[tokens, hidden]`; keys and values go to the cache.
    pub fn forward(
        &self,
        ops: &Ops<'_>,
        x: &Input,
        cache: &mut KvCache,
        at: Place<'_>,
        y: &mut Buffer,
        s: &mut Scratch,
    ) {
        let heads = self.heads;
        ops.linears(&self.qkv_proj, x, &mut s.qkv);
        ops.rope_and_store(&mut s.qkv, heads, at.rotations, cache, at.layer, at.first);
        ops.attention(
            &s.qkv,
            heads,
            cache,
            at.layer,
            at.first,
            self.mask,
            self.scale,
            &mut s.heads,
        );
        ops.input(&s.heads, &self.o_proj.weight, &mut s.input);
        ops.linear(&self.o_proj, &s.input, y);
    }
}
