//! Which keys a query sees.
//!
//! The one place that knows the layouts: attention, the KV cache and the accounts of the benchmark
//! ask here.

use std::ops::Range;

/// Positions of a block of the cache where the layout does not ask for smaller ones.
pub const BLOCK: usize = 256;

/// Which keys at or before it a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Those at or before it, at most `window` of them (itself included).
    Causal {
        /// Keys that each query sees at most.
        window: Option<usize>,
    },
    /// Those of some blocks.
    BlockSparse(BlockSparse),
}

/// Local blocks and vertical strides, as Phi-3-small has them.
///
/// Positions are divided in blocks of `block`. Head `h` in query block `q` sees key block `k`, if
/// `k <= q`, when `q - k < local_blocks` or `(k + h * head_step + 1) % vert_stride == 0`; at or before
/// itself, as everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSparse {
    /// Positions in a block: a multiple of 16 that divides [`BLOCK`].
    pub block: usize,
    /// Blocks that every head sees, its own included; at least one.
    pub local_blocks: usize,
    /// Of this many blocks one is seen for ever; at least one.
    pub vert_stride: usize,
    /// By how much the strides of neighbouring heads differ; 0: all heads alike.
    pub head_step: usize,
}

impl BlockSparse {
    /// The same with strides that differ among `heads` heads: their offsets spread over the stride.
    #[must_use]
    pub fn with_offsets(self, heads: usize) -> Self {
        Self {
            head_step: (self.vert_stride / heads).max(1),
            ..self
        }
    }

    /// Whether the queries of a block see the keys of another.
    #[must_use]
    pub fn sees(&self, head: usize, query_block: usize, key_block: usize) -> bool {
        key_block <= query_block
            && (query_block - key_block < self.local_blocks || self.keeps(head, key_block))
    }

    /// Whether all later queries see a block.
    fn keeps(&self, head: usize, key_block: usize) -> bool {
        (key_block + head * self.head_step + 1).is_multiple_of(self.vert_stride)
    }
}

impl Mask {
    /// All that is at or before the query.
    pub const CAUSAL: Self = Self::Causal { window: None };

    /// Positions that attention merges at a time, and that lie together in the cache.
    #[must_use]
    pub fn block(&self) -> usize {
        match self {
            Self::Causal { .. } => BLOCK,
            Self::BlockSparse(layout) => layout.block,
        }
    }

    /// Whether the heads differ in what they see.
    #[must_use]
    pub fn differs_by_head(&self) -> bool {
        matches!(self, Self::BlockSparse(_))
    }

    /// What the query of a head at `position` sees of block `block`: a range of positions.
    #[must_use]
    pub fn seen(&self, head: usize, position: usize, block: usize) -> Range<usize> {
        let (start, end) = (block * self.block(), (block + 1) * self.block());
        let upto = end.min(position + 1).max(start);
        match self {
            Self::Causal { window } => {
                let first = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
                first.clamp(start, upto)..upto
            }
            Self::BlockSparse(layout) if layout.sees(head, position / layout.block, block) => {
                start..upto
            }
            Self::BlockSparse(_) => start..start,
        }
    }

    /// The blocks of which some query at `positions`, of one of `heads`, sees something, ascending.
    pub fn blocks(
        self,
        heads: Range<usize>,
        positions: Range<usize>,
    ) -> impl Iterator<Item = usize> {
        let size = self.block();
        let last = positions.end.saturating_sub(1);
        let start = match self {
            Self::Causal { window } => {
                (positions.start + 1).saturating_sub(window.unwrap_or(usize::MAX)) / size
            }
            Self::BlockSparse(_) => 0,
        };
        let of_queries = positions.start / size..last / size + 1;
        (start..of_queries.end).filter(move |&block| match self {
            Self::Causal { .. } => true,
            Self::BlockSparse(layout) => heads
                .clone()
                .any(|head| (of_queries.clone()).any(|query| layout.sees(head, query, block))),
        })
    }

    /// Blocks before this one do not change any more for the queries at `next` and later: either
    /// [`Mask::keeps`] them, or none of these queries sees them.
    #[must_use]
    pub fn settled(&self, next: usize) -> usize {
        match self {
            Self::Causal { window } => {
                (next + 1).saturating_sub(window.unwrap_or(usize::MAX)) / BLOCK
            }
            Self::BlockSparse(layout) => {
                (next / layout.block + 1).saturating_sub(layout.local_blocks)
            }
        }
    }

    /// Whether one of `heads` sees a block from every later position.
    #[must_use]
    pub fn keeps(&self, mut heads: Range<usize>, block: usize) -> bool {
        match self {
            Self::Causal { .. } => false,
            Self::BlockSparse(layout) => heads.any(|head| layout.keeps(head, block)),
        }
    }

    /// Keys that the queries of all `heads` at `positions` see, added up.
    #[must_use]
    pub fn count_seen(&self, heads: usize, positions: Range<usize>) -> usize {
        if self.differs_by_head() {
            let of = |head| self.count_seen_by(head, positions.clone());
            (0..heads).map(of).sum()
        } else {
            heads * self.count_seen_by(0, positions)
        }
    }

    /// Keys that must be read for the queries at `positions`, each once for each of `kv_heads`.
    #[must_use]
    pub fn count_read(&self, heads: usize, kv_heads: usize, positions: Range<usize>) -> usize {
        let group = heads / kv_heads;
        if self.differs_by_head() {
            let of = |h| self.count_read_by(h * group..(h + 1) * group, positions.clone());
            (0..kv_heads).map(of).sum()
        } else {
            kv_heads * self.count_read_by(0..group, positions)
        }
    }

    fn count_seen_by(&self, head: usize, positions: Range<usize>) -> usize {
        let of = |position: usize| -> usize {
            (self.blocks(head..head + 1, position..position + 1))
                .map(|block| self.seen(head, position, block).len())
                .sum()
        };
        match self {
            Self::Causal { window } => positions
                .map(|p| (p + 1).min(window.unwrap_or(usize::MAX)))
                .sum(),
            // Neighbours in a block differ in their own block only, by one key each.
            Self::BlockSparse(layout) => (positions.start / layout.block
                ..positions.end.div_ceil(layout.block))
                .map(|block| {
                    let first = positions.start.max(block * layout.block);
                    let count = positions.end.min((block + 1) * layout.block) - first;
                    count * of(first) + count * count.saturating_sub(1) / 2
                })
                .sum(),
        }
    }

    fn count_read_by(&self, heads: Range<usize>, positions: Range<usize>) -> usize {
        let end = positions.end;
        let first = positions.start;
        (self.blocks(heads.clone(), positions))
            .map(|block| match self {
                Self::Causal { .. } => {
                    let from = self.seen(heads.start, first, block).start;
                    end.min((block + 1) * BLOCK) - from
                }
                Self::BlockSparse(layout) => {
                    end.min((block + 1) * layout.block) - block * layout.block
                }
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn the_window_counts_the_query_itself() {
        let mask = Mask::Causal { window: Some(3) };
        assert_eq!(
            [0, 1, 2, 3, 9].map(|p| mask.seen(0, p, 0)),
            [0..1, 0..2, 0..3, 1..4, 7..10]
        );
        assert_eq!(Mask::CAUSAL.seen(7, 5, 0), 0..6);
        assert!(Mask::CAUSAL.seen(0, 5, 1).is_empty());
        // Over the border of a block.
        assert_eq!(mask.seen(0, BLOCK, 0), BLOCK - 2..BLOCK);
        assert_eq!(mask.seen(0, BLOCK, 1), BLOCK..BLOCK + 1);
        let blocks = |positions| mask.blocks(0..1, positions).collect::<Vec<_>>();
        assert_eq!(blocks(BLOCK + 1..BLOCK + 2), [0, 1]);
        assert_eq!(blocks(BLOCK + 2..3 * BLOCK), [1, 2]);
    }

    /// The layouts that the reference gives.
    #[test]
    fn layouts_are_the_published_ones() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/phi3-small-ops"
        );
        let read = |name: &str| std::fs::read(format!("{folder}/{name}")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&read("manifest.json")).unwrap();
        let expected = read("expected.safetensors");
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let mut layouts = 0;
        for (name, case) in manifest["cases"].as_object().unwrap() {
            let number = |key: &str| case[key].as_u64().unwrap() as usize;
            let (heads, blocks) = (number("n_heads"), number("n_blocks"));
            let alike = BlockSparse {
                block: 64,
                local_blocks: number("num_local_blocks"),
                vert_stride: number("vert_stride"),
                head_step: 0,
            };
            let layout = match case["homo_head_pattern"].as_bool().unwrap() {
                true => alike,
                false => alike.with_offsets(heads),
            };
            let expected = expected.tensor(name).unwrap();
            assert_eq!(expected.shape(), [heads, blocks, blocks]);
            let mut expected = expected.data().iter();
            for (head, query) in (0..heads).flat_map(|h| (0..blocks).map(move |q| (h, q))) {
                for (key, want) in (0..blocks).zip(&mut expected) {
                    let sees = layout.sees(head, query, key);
                    assert_eq!(sees, *want == 1, "{name}: head {head}, {query} sees {key}");
                }
            }
            layouts += 1;
        }
        assert_eq!(layouts, 6);
    }

    const SPARSE: BlockSparse = BlockSparse {
        block: 16,
        local_blocks: 2,
        vert_stride: 5,
        head_step: 1,
    };

    const MASKS: [Mask; 5] = [
        Mask::CAUSAL,
        Mask::Causal { window: Some(1) },
        Mask::Causal { window: Some(300) },
        Mask::BlockSparse(SPARSE),
        Mask::BlockSparse(BlockSparse {
            local_blocks: 1,
            head_step: 0,
            ..SPARSE
        }),
    ];

    /// Everything else follows from what single queries see.
    #[test]
    fn blocks_counts_and_the_settled_agree_with_single_queries() {
        for mask in MASKS {
            let size = mask.block();
            let end = 40 * 16 + 3;
            let key_blocks = end / size + 1;
            let heads = 1..4;
            for positions in [0..1, 5..6, 15..17, 300..340, 250..600, 639..640, 0..end] {
                let union = |block: usize| -> Vec<usize> {
                    let mut keys: Vec<_> = (positions.clone())
                        .flat_map(|p| heads.clone().flat_map(move |h| mask.seen(h, p, block)))
                        .collect();
                    keys.sort_unstable();
                    keys.dedup();
                    keys
                };
                let read: Vec<_> = (0..key_blocks).map(|block| union(block).len()).collect();
                let blocks: Vec<_> = mask.blocks(heads.clone(), positions.clone()).collect();
                let want: Vec<_> = (0..key_blocks).filter(|b| read[*b] > 0).collect();
                assert_eq!(blocks, want, "{mask:?} {positions:?}");
                let total = mask.count_read_by(heads.clone(), positions.clone());
                assert_eq!(total, read.iter().sum::<usize>(), "{mask:?} {positions:?}");
                for head in heads.clone() {
                    let seen: usize = (positions.clone())
                        .flat_map(|p| (0..key_blocks).map(move |b| mask.seen(head, p, b).len()))
                        .sum();
                    let counted = mask.count_seen_by(head, positions.clone());
                    assert_eq!(counted, seen, "{mask:?} {positions:?}");
                }
                let by_head = |head| mask.count_seen_by(head, positions.clone());
                let all = mask.count_seen(6, positions.clone());
                assert_eq!(all, (0..6).map(by_head).sum::<usize>());
                let of = |group| mask.count_read_by(group, positions.clone());
                let all = mask.count_read(6, 2, positions.clone());
                assert_eq!(all, of(0..3) + of(3..6));
            }
            for next in [0, 1, 15, 16, 31, 32, 256, 299, 300, 555, 556] {
                for block in 0..mask.settled(next) {
                    for head in heads.clone() {
                        let later = (next..end).filter(|p| !mask.seen(head, *p, block).is_empty());
                        let keeps = mask.keeps(head..head + 1, block);
                        let count = if keeps { end - next } else { 0 };
                        assert_eq!(later.count(), count, "{mask:?} {next} {block}");
                    }
                }
                let open = mask.settled(next);
                assert!(
                    !mask.seen(1, next, open).is_empty(),
                    "{mask:?}: more are settled"
                );
            }
        }
    }
}
