//! Causal self-attention with rotary positions, grouped heads and an optional sliding window.

use phidias_engine::backend::{Backend, Heads, Mask, Ops, Seen};
use phidias_engine::tensor::{Linear, Matrix};

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

/// What attention works with, kept from layer to layer.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    qkv: B::Buffer,
    heads: B::Buffer,
    input: B::Input,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            qkv: B::Buffer::default(),
            heads: B::Buffer::default(),
            input: B::Input::default(),
        }
    }
}

impl Attention {
    /// A matrix that its input is made for.
    #[must_use]
    pub fn matrix(&self) -> &Matrix {
        &self.qkv_proj[0].weight
    }

    /// `y = attention(x)`, both `[tokens, hidden]`; keys and values go to `layer` of the cache.
    #[allow(
        clippy::too_many_arguments,
        reason = "what goes in, what is kept, what comes out"
    )]
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        x: &B::Input,
        tokens: &B::Tokens,
        cache: &mut B::Cache,
        layer: usize,
        y: &mut B::Buffer,
        s: &mut Scratch<B>,
    ) {
        let heads = self.heads;
        let seen = Seen {
            layer,
            mask: self.mask,
            scale: self.scale,
        };
        ops.linears(&self.qkv_proj, x, &mut s.qkv);
        ops.rope_and_store(&mut s.qkv, heads, tokens, cache, layer);
        let (w, qkv) = (&self.o_proj.weight, &s.qkv);
        ops.attention_input(
            qkv,
            heads,
            tokens,
            cache,
            seen,
            w,
            &mut s.heads,
            &mut s.input,
        );
        ops.linear(&self.o_proj, &s.input, y);
    }
}
