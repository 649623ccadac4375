//! The decoder: embedding, layers, norm, head.

use crate::blocks::attention::{self, Attention, Place};
use crate::blocks::head::LmHead;
use crate::blocks::mlp::{self, Mlp};
use crate::blocks::moe::{self, LayerRouting, Moe};
use crate::blocks::rope::{Regime, Rope};
use phidias_engine::Cancel;
use phidias_engine::backend::{Expert, Input, Norm, Ops, PICKS, Rotations};
use phidias_engine::kv_cache::KvCache;
use phidias_engine::tensor::{Buffer, Matrix};
use std::sync::Arc;

/// One layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Before attention.
    pub input_norm: Norm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub post_attention_norm: Norm,
    /// What each token goes through alone.
    pub feed_forward: FeedForward,
}

/// What each token goes through alone.
#[derive(Clone, Debug)]
pub enum FeedForward {
    /// All of it.
    Dense(Mlp),
    /// Some experts of many.
    Moe(Moe),
}

impl Layer {
    /// The matrices that every token is multiplied with.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let projections = self.attention.qkv_proj.iter().map(|w| &w.weight);
        let (mlp, router) = match &self.feed_forward {
            FeedForward::Dense(mlp) => (Some(mlp), None),
            FeedForward::Moe(moe) => (None, Some(&moe.router.weight)),
        };
        projections
            .chain([&self.attention.o_proj.weight])
            .chain(mlp.into_iter().flat_map(Mlp::matrices))
            .chain(router)
    }

    /// Its experts, of which a token is multiplied with some; none in a layer without.
    #[must_use]
    pub fn experts(&self) -> &[Expert] {
        match &self.feed_forward {
            FeedForward::Dense(_) => &[],
            FeedForward::Moe(moe) => &moe.experts,
        }
    }
}

/// A decoder-only transformer.
#[derive(Clone, Debug)]
pub struct Transformer {
    /// `[vocab, hidden]`
    pub embed_tokens: Matrix,
    /// Factor on the embedded tokens.
    pub embedding_multiplier: f32,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Before the head.
    pub norm: Norm,
    /// From hidden states to logits.
    pub lm_head: LmHead,
    /// Rotary embedding.
    pub rope: Rope,
}

/// Buffers of a forward pass, kept from one to the next.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The residual stream, `[tokens, hidden]`.
    x: Buffer,
    /// The last norm's output.
    normed: Buffer,
    /// A norm's output as the next matrix takes it.
    input: Input,
    /// What attention or the MLP gave, to be added to `x` when the next norm reads it.
    branch: Buffer,
    rotations: Rotations,
    attention: attention::Scratch,
    mlp: mlp::Scratch,
    moe: moe::Scratch,
    /// Of each layer, since it was last taken.
    routing: Vec<LayerRouting>,
}

impl Workspace {
    /// What the last pass gave: the rows after the last norm, `[tokens, hidden]`.
    #[must_use]
    pub fn hidden(&self) -> &Buffer {
        &self.normed
    }

    /// How tokens were spread over the experts of each layer since the last call; layers without experts
    /// have none.
    pub fn take_routing(&mut self) -> Vec<LayerRouting> {
        std::mem::take(&mut self.routing)
    }
}

/// A place in the forward pass that can be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// The embedded tokens.
    Embed,
    /// A layer's attention, after the output projection, before it is added.
    AttentionOut(usize),
    /// The scores of a layer's experts, `[tokens, experts]`.
    RouterScores(usize),
    /// A layer's MLP, before it is added.
    MlpOut(usize),
    /// The residual stream after a layer.
    LayerOut(usize),
    /// After the last norm.
    FinalNorm,
}

/// Looks at the values of a forward pass: the place, the position of the first row, the rows.
pub type Observer<'a> = &'a mut (dyn FnMut(Point, usize, &Buffer) + Send);

/// Rows that stand in the places of embedded tokens: the features of a picture.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Position of the first one.
    pub start: usize,
    /// How many of them count.
    pub len: usize,
    /// `[.., hidden]`
    pub rows: Arc<Buffer>,
}

impl Placed {
    /// Writes the rows at positions `first ..` over those of `x`.
    fn overwrite(&self, first: usize, x: &mut Buffer) {
        let from = self.start.max(first);
        let to = (self.start + self.len).min(first + x.rows());
        for position in from..to {
            let row = self.rows.row(position - self.start);
            x.row_mut(position - first).copy_from_slice(row);
        }
    }
}

/// What a forward pass runs on.
pub struct Pass<'a> {
    /// The operations of the device.
    pub ops: &'a Ops<'a>,
    /// Rows that stand in the places of embedded tokens.
    pub pictures: &'a [Placed],
    /// Keys and values so far; those of the pass are added.
    pub cache: &'a mut KvCache,
    /// Stops the pass.
    pub cancel: &'a Cancel,
    /// Sees its values.
    pub observe: Observer<'a>,
}

/// The pass was stopped; the cache's length is what it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

impl Transformer {
    /// Runs `ids` at positions `cache.len() ..` through all layers; the result is
    /// [`Workspace::hidden`]. The cache must have room.
    /// # Errors
    /// [`Cancelled`], looked at between layers.
    pub fn forward(
        &self,
        ids: &[u32],
        regime: Regime,
        pass: Pass<'_>,
        w: &mut Workspace,
    ) -> Result<(), Cancelled> {
        let Pass {
            ops,
            pictures,
            cache,
            cancel,
            observe,
        } = pass;
        let first = cache.len();
        self.rope
            .rotations(regime, first, ids.len(), &mut w.rotations);
        let multiplier = self.embedding_multiplier;
        ops.embed(&self.embed_tokens, ids, multiplier, &mut w.x);
        w.branch.reshape(w.x.rows(), w.x.cols());
        w.branch.data_mut().fill(0.0);
        for picture in pictures {
            picture.overwrite(first, &mut w.x);
        }
        observe(Point::Embed, first, &w.x);
        if w.routing.is_empty() {
            let experts = self.layers.iter().map(|layer| layer.experts().len());
            w.routing = experts.map(LayerRouting::new).collect();
        }
        for (l, layer) in self.layers.iter().enumerate() {
            if cancel.is_cancelled() {
                return Err(Cancelled);
            }
            let at = Place {
                layer: l,
                first,
                rotations: &w.rotations,
            };
            let attention = &layer.attention;
            let (norm, matrix) = (&layer.input_norm, attention.matrix());
            ops.add_norm_input(&mut w.x, &w.branch, norm, matrix, &mut w.input);
            if l > 0 {
                observe(Point::LayerOut(l - 1), first, &w.x);
            }
            attention.forward(ops, &w.input, cache, at, &mut w.branch, &mut w.attention);
            observe(Point::AttentionOut(l), first, &w.branch);
            let norm = &layer.post_attention_norm;
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => {
                    let matrix = mlp.gate_up.matrix();
                    ops.add_norm_input(&mut w.x, &w.branch, norm, matrix, &mut w.input);
                    mlp.forward(ops, &w.input, &mut w.branch, &mut w.mlp);
                }
                FeedForward::Moe(moe) => {
                    // The router takes floats, and each expert some of the rows.
                    ops.add_norm(&mut w.x, &w.branch, norm, &mut w.normed);
                    let (x, y, s) = (&w.normed, &mut w.branch, &mut w.moe);
                    moe.forward(ops, x, y, s, &mut w.routing[l]);
                    observe(Point::RouterScores(l), first, &w.moe.scores);
                }
            }
            observe(Point::MlpOut(l), first, &w.branch);
        }
        ops.add_norm(&mut w.x, &w.branch, &self.norm, &mut w.normed);
        observe(Point::LayerOut(self.layers.len() - 1), first, &w.x);
        observe(Point::FinalNorm, first, &w.normed);
        cache.set_len(first + ids.len());
        Ok(())
    }

    /// Bytes of weights that one token reads: every matrix once, of the experts those that it is given
    /// to; its row of the embedding is not counted.
    #[must_use]
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.layers.iter().flat_map(Layer::matrices);
        let experts = (self.layers.iter()).flat_map(|layer| layer.experts().iter().take(PICKS));
        layers.map(Matrix::bytes).sum::<usize>()
            + experts.map(Expert::bytes).sum::<usize>()
            + self.lm_head.linear.weight.bytes()
    }
}
