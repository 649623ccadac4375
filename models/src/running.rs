//! A model on a backend, as a session sees it: without knowing which one.

use crate::blocks::head;
use crate::blocks::moe::LayerRouting;
use crate::blocks::rope::Regime;
use crate::error::Error;
use crate::image::Processed;
use crate::transformer::{Cancelled, Observer, Pass, Placed, Transformer, Workspace};
use crate::vision::{self, Vision};
use phidias_engine::Cancel;
use phidias_engine::backend::{Backend, Cache, Ops, Rotations, Tokens};
use phidias_engine::generate::Next;
use phidias_engine::tensor::Buffer;
use std::ops::Range;
use std::sync::Arc;

/// Rows of logits computed together when all of them are wanted: bounds their memory.
pub(crate) const LOGIT_ROWS: usize = 32;

/// Passes of up to so many tokens come again and again: decoding, alone or with guesses.
const REPEATED: usize = 8;

/// Tokens to be computed, at the positions that follow the cached ones.
pub(crate) struct Chunk<'a> {
    /// What they are.
    pub ids: &'a [u32],
    /// The factors they are rotated with.
    pub regime: Regime,
    /// The pictures of the sequence.
    pub pictures: &'a [Placed],
    /// Positions whose logits are wanted.
    pub wanted: Range<usize>,
    /// How many of the likeliest tokens might do in place of all logits.
    pub candidates: Option<usize>,
    /// Stops the pass.
    pub cancel: &'a Cancel,
    /// Sees its values.
    pub observe: Option<Observer<'a>>,
}

/// A backend with a cache and buffers.
pub(crate) trait Runner: Send {
    /// Keys and values of the sequence.
    fn cache(&self) -> &dyn Cache;

    /// The same, to be changed.
    fn cache_mut(&mut self) -> &mut dyn Cache;

    /// Computes a chunk, for which the cache has room, and says what may follow the wanted positions:
    /// `each(position, next)`. Candidates are at least as many as were asked for.
    fn pass(
        &mut self,
        transformer: &Transformer,
        chunk: Chunk<'_>,
        each: &mut dyn FnMut(usize, Next<'_>),
    ) -> Result<(), Error>;

    /// All logits of a position of which the last pass gave candidates, or of its last one.
    fn logits(&mut self, position: usize) -> Result<&[f32], Error>;

    /// The features of pictures, `[tokens, hidden]` each; `progress` hears of the crops that are done. What
    /// the cache holds beyond its positions is given back first: the encoder works there.
    fn encode(
        &mut self,
        vision: &Vision,
        pictures: &[Processed],
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<Arc<Buffer>>, Error>;

    /// See [`Workspace::take_routing`].
    fn take_routing(&mut self) -> Result<Vec<LayerRouting>, Error>;
}

/// The one [`Runner`] there is, of any backend.
pub(crate) struct Running<B: Backend> {
    backend: B,
    cache: B::Cache,
    tokens: B::Tokens,
    workspace: Workspace<B>,
    head: head::Scratch<B>,
    /// The positions whose logits are in `head`.
    known: Range<usize>,
    /// Logits that were read.
    read: Buffer,
}

impl<B: Backend> Running<B> {
    pub(crate) fn new(backend: B, cache: B::Cache) -> Self {
        Self {
            backend,
            cache,
            tokens: B::Tokens::default(),
            workspace: Workspace::default(),
            head: head::Scratch::default(),
            known: 0..0,
            read: Buffer::default(),
        }
    }
}

impl<B: Backend> Runner for Running<B> {
    fn cache(&self) -> &dyn Cache {
        &self.cache
    }

    fn cache_mut(&mut self) -> &mut dyn Cache {
        &mut self.cache
    }

    fn pass(
        &mut self,
        transformer: &Transformer,
        chunk: Chunk<'_>,
        each: &mut dyn FnMut(usize, Next<'_>),
    ) -> Result<(), Error> {
        let Self {
            backend,
            cache,
            tokens,
            workspace,
            head,
            known,
            read,
        } = self;
        let count = chunk.ids.len();
        let first = cache.len();
        let positions = first..first + count;
        let mut rotations = Rotations::default();
        (transformer.rope).rotations(chunk.regime, first, count, &mut rotations);
        let placed = Tokens {
            ids: chunk.ids.to_vec(),
            first,
            rotations,
        };
        backend.place(placed, tokens);

        let wanted = chunk.wanted;
        let mut groups = (wanted.clone().step_by(LOGIT_ROWS))
            .map(|from| from..wanted.end.min(from + LOGIT_ROWS));
        let group = groups.next();
        let within = |rows: &Range<usize>| rows.start - first..rows.end - first;
        let pictures = chunk.pictures.iter().any(|p| p.meets(&positions));
        let repeated = count <= REPEATED && chunk.observe.is_none() && !pictures;
        // Of more rows the head keeps the last logits only. Few different numbers are few recordings.
        let vocab = transformer.lm_head.linear.weight.rows();
        let candidates = (chunk.candidates)
            .filter(|_| (1..=LOGIT_ROWS).contains(&wanted.len()))
            .map(|count| count.next_power_of_two().min(vocab));
        // One entry for the whole pass, the first logits included.
        let pass = |ops: &B::Ops<'_>| {
            let pass = Pass {
                tokens,
                positions: positions.clone(),
                pictures: chunk.pictures,
                cache,
                cancel: chunk.cancel,
                observe: chunk.observe.map(|observe| observe as Observer<'_>),
            };
            transformer.forward(ops, pass, workspace)?;
            if let Some(rows) = &group {
                transformer.logits(ops, workspace, within(rows), head);
                if let Some(count) = candidates {
                    ops.candidates(&head.logits, count, &mut head.found);
                }
            }
            Ok(())
        };
        let done = match repeated {
            // The wanted rows are the last ones.
            true => {
                let key = count * (REPEATED + 1) + wanted.len();
                let kinds = (REPEATED + 1) * (REPEATED + 1);
                backend.repeat(candidates.unwrap_or(0) * kinds + key, pass)
            }
            false => backend.enter(pass),
        };
        done?.map_err(|Cancelled| Error::Cancelled)?;
        self.cache.set_len(positions.end);

        *known = wanted.clone();
        if candidates.is_some()
            && let Some(found) = backend.read_candidates(&head.found)?
        {
            (wanted.zip(found)).for_each(|(t, found)| each(t, Next::Candidates(found)));
            return Ok(());
        }
        let mut hand_out = |rows: &Range<usize>, logits: &Buffer| {
            rows.clone()
                .for_each(|t| each(t, Next::Logits(logits.row(t - rows.start))));
        };
        if let Some(rows) = group {
            hand_out(&rows, backend.read(&head.logits, read)?);
        }
        for rows in groups {
            *known = rows.clone();
            backend.enter(|ops| transformer.logits(ops, workspace, within(&rows), head))?;
            hand_out(&rows, backend.read(&head.logits, read)?);
        }
        Ok(())
    }

    fn logits(&mut self, position: usize) -> Result<&[f32], Error> {
        let known = &self.known;
        assert!(
            known.contains(&position),
            "logits of position {position}, those of {known:?} are known"
        );
        let row = position - known.start;
        Ok((self.backend).read_row(&self.head.logits, row, &mut self.read)?)
    }

    fn encode(
        &mut self,
        vision: &Vision,
        pictures: &[Processed],
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<Arc<Buffer>>, Error> {
        self.cache.give_back();
        let mut scratch = vision::Scratch::<B>::default();
        let mut features = Vec::new();
        let mut before = 0;
        for picture in pictures {
            let mut progress = |done, _| progress(before + done);
            let rows =
                vision.encode(&self.backend, picture, cancel, &mut progress, &mut scratch)?;
            features.push(Arc::new(rows));
            before += picture.crops();
        }
        Ok(features)
    }

    fn take_routing(&mut self) -> Result<Vec<LayerRouting>, Error> {
        Ok(self.workspace.take_routing(&self.backend)?)
    }
}
