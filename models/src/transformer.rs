//! The decoder: embedding, layers, norm, head.

use crate::blocks::attention::{self, Attention};
use crate::blocks::head::{self, LmHead};
use crate::blocks::mlp::{self, Mlp};
use crate::blocks::moe::{self, LayerRouting, Moe};
use crate::blocks::rope::Rope;
use phidias_engine::Cancel;
use phidias_engine::backend::{Backend, DeviceFailed, Expert, Norm, Ops, PICKS};
use phidias_engine::tensor::{Buffer, Matrix};
use std::ops::Range;
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
#[derive(Debug)]
pub struct Workspace<B: Backend> {
    /// The residual stream, `[tokens, hidden]`.
    x: B::Buffer,
    /// A norm's output, where it is needed as it is.
    normed: B::Buffer,
    /// A norm's output as the next matrix takes it.
    input: B::Input,
    /// What attention or the MLP gave, to be added to `x` when the next norm reads it.
    branch: B::Buffer,
    attention: attention::Scratch<B>,
    mlp: mlp::Scratch<B>,
    moe: moe::Scratch<B>,
    /// Of each layer, since they were last taken.
    loads: Vec<B::Loads>,
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self {
            x: B::Buffer::default(),
            normed: B::Buffer::default(),
            input: B::Input::default(),
            branch: B::Buffer::default(),
            attention: attention::Scratch::default(),
            mlp: mlp::Scratch::default(),
            moe: moe::Scratch::default(),
            loads: Vec::default(),
        }
    }
}

impl<B: Backend> Workspace<B> {
    /// How tokens were spread over the experts of each layer since the last call; layers without experts
    /// have none.
    /// # Errors
    /// When the device fails.
    pub fn take_routing(&mut self, backend: &B) -> Result<Vec<LayerRouting>, DeviceFailed> {
        (self.loads.iter_mut())
            .map(|loads| backend.take_loads(loads))
            .collect()
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
    /// Whether some of it stands at these positions.
    pub(crate) fn meets(&self, positions: &Range<usize>) -> bool {
        self.start < positions.end && positions.start < self.start + self.len
    }

    /// Writes the rows at positions `first ..` over those of `x`, which are so many.
    fn overwrite<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        first: usize,
        rows: usize,
        x: &mut B::Buffer,
    ) {
        let from = self.start.max(first);
        let to = (self.start + self.len).min(first + rows);
        if from < to {
            let cols = self.rows.cols();
            let values = &self.rows.data()[(from - self.start) * cols..(to - self.start) * cols];
            ops.write(values, from - first, x);
        }
    }
}

/// What a forward pass goes over, and who looks.
pub struct Pass<'a, B: Backend> {
    /// Its tokens.
    pub tokens: &'a B::Tokens,
    /// Their positions.
    pub positions: Range<usize>,
    /// Rows that stand in the places of embedded tokens.
    pub pictures: &'a [Placed],
    /// Keys and values so far; those of the pass are added.
    pub cache: &'a mut B::Cache,
    /// Stops the pass.
    pub cancel: &'a Cancel,
    /// Sees its values.
    pub observe: Option<Observer<'a>>,
}

/// Shows values to who looks at them; otherwise they stay where they are.
struct Watch<'a> {
    observe: Option<Observer<'a>>,
    first: usize,
    copy: Buffer,
}

impl Watch<'_> {
    fn see<B: Backend>(&mut self, ops: &impl Ops<B>, point: Point, rows: &B::Buffer) {
        if let Some(observe) = &mut self.observe {
            observe(point, self.first, ops.read(rows, &mut self.copy));
        }
    }
}

/// The pass was stopped; the cache's length is what it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

impl Transformer {
    /// Runs tokens through all layers; what of the result is wanted, [`Transformer::logits`] gives. The cache must
    /// have room, and its length is the caller's to change.
    /// # Errors
    /// [`Cancelled`], looked at between layers.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        pass: Pass<'_, B>,
        w: &mut Workspace<B>,
    ) -> Result<(), Cancelled> {
        let Pass {
            tokens,
            positions,
            pictures,
            cache,
            cancel,
            observe,
        } = pass;
        let (first, rows) = (positions.start, positions.len());
        let mut watch = Watch {
            observe,
            first,
            copy: Buffer::default(),
        };
        let multiplier = self.embedding_multiplier;
        ops.embed(&self.embed_tokens, tokens, multiplier, &mut w.x);
        for picture in pictures {
            picture.overwrite(ops, first, rows, &mut w.x);
        }
        watch.see(ops, Point::Embed, &w.x);
        ops.zeros(rows, self.embed_tokens.cols(), &mut w.branch);
        w.loads.resize_with(self.layers.len(), B::Loads::default);
        for (l, layer) in self.layers.iter().enumerate() {
            if cancel.is_cancelled() {
                return Err(Cancelled);
            }
            let attention = &layer.attention;
            let (norm, matrix) = (&layer.input_norm, attention.matrix());
            ops.add_norm_input(&mut w.x, &w.branch, norm, matrix, &mut w.input);
            if l > 0 {
                watch.see(ops, Point::LayerOut(l - 1), &w.x);
            }
            let (x, y, s) = (&w.input, &mut w.branch, &mut w.attention);
            attention.forward(ops, x, tokens, cache, l, y, s);
            watch.see(ops, Point::AttentionOut(l), &w.branch);
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
                    moe.forward(ops, x, y, s, &mut w.loads[l]);
                    watch.see(ops, Point::RouterScores(l), &w.moe.scores);
                }
            }
            watch.see(ops, Point::MlpOut(l), &w.branch);
        }
        if watch.observe.is_some() {
            // The head adds the last branch itself, to the rows that are wanted; who looks sees all of them.
            let mut normed = B::Buffer::default();
            ops.reshape(rows, self.embed_tokens.cols(), &mut w.normed);
            ops.copy_rows(&w.x, 0..rows, &mut w.normed, 0);
            ops.add_norm(&mut w.normed, &w.branch, &self.norm, &mut normed);
            watch.see(ops, Point::LayerOut(self.layers.len() - 1), &w.normed);
            watch.see(ops, Point::FinalNorm, &normed);
        }
        Ok(())
    }

    /// The logits of some rows of the last pass, in `s.logits`: the last norm, and the head.
    pub fn logits<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        w: &Workspace<B>,
        rows: Range<usize>,
        s: &mut head::Scratch<B>,
    ) {
        (self.lm_head).forward(ops, (&w.x, &w.branch), &self.norm, rows, s);
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
