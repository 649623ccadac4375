//! What a token must read and compute, counted from the model's shapes.
//!
//! ```text
//! Weights    a pass reads every matrix of the layers once, whatever the number of its tokens; the
//!            head is computed for the last token of a test only. The embedding is one row: not counted
//! Experts    a pass reads those that it has tokens for: two a layer when it has one token; when it has
//!            more, as many as were counted while it ran. A token is multiplied with two a layer
//! KV cache   a pass reads, once, the keys of each head that its queries see, and their values; what it
//!            writes is not counted
//! Operations a multiply-add is two. `ops`: the matrices; `attention_ops`: scores and weighted values
//!            of the keys seen, 4 * head_dim for each query head and layer
//! ```
//!
//! These are the least that the computation needs: a kernel that reads or multiplies more is slower
//! than its share of the peak says, never faster.

use phidias_engine::backend::{Mask, PICKS};
use phidias_engine::kv_cache::KvType;
use phidias_engine::tensor::Matrix;
use phidias_models::transformer::Layer;
use phidias_models::{Config, Model};

/// Some matrices together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weights {
    /// Bytes as stored.
    pub bytes: usize,
    /// Elements: multiply-adds a token.
    pub elements: usize,
}

impl Weights {
    /// Some matrices as they lie, or widened to f32.
    fn of<'m>(matrices: impl IntoIterator<Item = &'m Matrix>, widened: bool) -> Self {
        (matrices.into_iter()).fold(Self::default(), |sum, m| {
            let elements = m.rows() * m.cols();
            Self {
                bytes: sum.bytes
                    + match widened {
                        true => elements * size_of::<f32>(),
                        false => m.bytes(),
                    },
                elements: sum.elements + elements,
            }
        })
    }
}

/// The experts of a model, alike in shape and format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Experts {
    /// One of them.
    pub each: Weights,
    /// Layers that have some.
    pub layers: usize,
}

impl Experts {
    /// Experts that a token is multiplied with.
    #[must_use]
    pub fn of_a_token(&self) -> usize {
        PICKS * self.layers
    }
}

/// The shapes that decide what a token costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    layers: Weights,
    head: Weights,
    experts: Experts,
    heads: usize,
    kv_heads: usize,
    /// Of a key and its value.
    kv_bytes: usize,
    /// Of a key and its value, for one query.
    attention_ops: usize,
    /// And how many layers have it.
    masks: Vec<(Mask, usize)>,
}

/// The cost of a token, on average over those of a test.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of weights.
    pub weight_bytes: f64,
    /// Bytes of keys and values.
    pub kv_bytes: f64,
    /// Operations on the weights.
    pub ops: f64,
    /// Operations on keys and values.
    pub attention_ops: f64,
}

impl Work {
    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> f64 {
        self.weight_bytes + self.kv_bytes
    }
}

impl Account {
    /// The account of a model whose cache stores `kv`.
    #[must_use]
    pub fn of(model: &Model, kv: KvType) -> Self {
        let transformer = model.transformer();
        let widened = model.widens();
        let layers = Weights::of(transformer.layers.iter().flat_map(Layer::matrices), widened);
        let head = Weights::of([&transformer.lm_head.linear.weight], widened);
        let mut firsts = transformer
            .layers
            .iter()
            .filter_map(|l| l.experts().first());
        let experts = Experts {
            layers: firsts.clone().count(),
            each: (firsts.next())
                .map_or(Weights::default(), |e| Weights::of(e.matrices(), widened)),
        };
        Self::new(model.config(), kv, layers, head, experts)
    }

    fn new(config: &Config, kv: KvType, layers: Weights, head: Weights, experts: Experts) -> Self {
        let shape = config.kv_shape();
        let mut masks: Vec<(Mask, usize)> = Vec::new();
        for mask in &shape.layers {
            match masks.iter_mut().find(|(known, _)| known == mask) {
                Some((_, layers)) => *layers += 1,
                None => masks.push((*mask, 1)),
            }
        }
        Self {
            layers,
            head,
            experts,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            kv_bytes: kv.bytes_per_key(shape.head_dim),
            attention_ops: 4 * shape.head_dim,
            masks,
        }
    }

    /// The weights of all layers, without their experts.
    #[must_use]
    pub fn layers(&self) -> Weights {
        self.layers
    }

    /// The weights of the head.
    #[must_use]
    pub fn head(&self) -> Weights {
        self.head
    }

    /// The experts.
    #[must_use]
    pub fn experts(&self) -> Experts {
        self.experts
    }

    /// `tokens` tokens one at a time, the first at position `depth`.
    #[must_use]
    pub fn decode(&self, depth: usize, tokens: usize) -> Work {
        let reads = tokens * self.experts.of_a_token();
        let passes = Passes {
            chunk: 1,
            heads: tokens,
            reads,
        };
        self.work(depth, tokens, passes)
    }

    /// `tokens` tokens at once, in chunks of `chunk`, the first at position `depth`; the passes read
    /// `reads` experts together.
    #[must_use]
    pub fn prefill(&self, depth: usize, tokens: usize, chunk: usize, reads: usize) -> Work {
        let passes = Passes {
            chunk: chunk.max(1),
            heads: 1,
            reads,
        };
        self.work(depth, tokens, passes)
    }

    fn work(&self, depth: usize, tokens: usize, of: Passes) -> Work {
        let Passes {
            chunk,
            heads,
            reads,
        } = of;
        let (mut passes, mut read, mut seen) = (0usize, 0usize, 0usize);
        for first in (depth..depth + tokens).step_by(chunk) {
            let end = (first + chunk).min(depth + tokens);
            passes += 1;
            for (mask, layers) in &self.masks {
                read += layers * mask.count_read(self.heads, self.kv_heads, first..end);
                seen += layers * mask.count_seen(self.heads, first..end);
            }
        }
        let a_token = |total: usize, each: usize| total as f64 * each as f64 / tokens as f64;
        let elements =
            self.layers.elements + self.experts.of_a_token() * self.experts.each.elements;
        Work {
            weight_bytes: a_token(passes, self.layers.bytes)
                + a_token(heads, self.head.bytes)
                + a_token(reads, self.experts.each.bytes),
            kv_bytes: a_token(read, self.kv_bytes),
            ops: 2.0 * (elements as f64 + a_token(heads, self.head.elements)),
            attention_ops: a_token(seen, self.attention_ops),
        }
    }
}

/// The passes of a test.
struct Passes {
    /// Tokens of each.
    chunk: usize,
    /// How often the head is computed.
    heads: usize,
    /// Experts read.
    reads: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use phidias_engine::Format;
    use phidias_engine::quant::PackedLayout;
    use phidias_models::weights::{HEAD, Role};
    use serde_json::json;
    use std::path::Path;

    /// Phi-3.5-mini, or the 4k model with its window.
    fn config(window: Option<usize>) -> Config {
        let json = json!({
            "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
            "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "sliding_window": window,
        });
        Config::from_json(Path::new("config.json"), json.to_string().as_bytes()).unwrap()
    }

    fn account(format: Format, window: Option<usize>) -> Account {
        let config = config(window);
        let (mut layers, mut head) = (Weights::default(), Weights::default());
        for spec in config.specs() {
            if spec.role == Role::Matrix {
                let to = if spec.name == HEAD {
                    &mut head
                } else {
                    &mut layers
                };
                let layout = PackedLayout::new(format, spec.shape[0], spec.shape[1]).unwrap();
                to.bytes += layout.bytes();
                to.elements += spec.shape[0] * spec.shape[1];
            }
        }
        Account::new(&config, KvType::F16, layers, head, Experts::default())
    }

    #[test]
    fn phi_3_5_mini_by_hand() {
        let q4 = account(Format::Q4, None);
        assert_eq!(q4.layers.elements, 3_623_878_656);
        assert_eq!(q4.head.elements, 98_500_608);
        let work = q4.decode(0, 1);
        assert_eq!(work.weight_bytes, 2_093_838_336.0);
        assert_eq!(work.kv_bytes, 393_216.0);
        assert_eq!(work.ops, 2.0 * 3_722_379_264.0);
        assert_eq!(work.attention_ops, 4.0 * 3072.0 * 32.0);
        let q8 = account(Format::Q8, None);
        assert_eq!(q8.decode(0, 1).weight_bytes, 3_955_027_968.0);
    }

    #[test]
    fn decode_at_depth_reads_the_cache_at_its_mean_length() {
        // Positions seen: 4097, 4098, 4099, 4100.
        let work = account(Format::Q4, None).decode(4096, 4);
        assert_eq!(work.kv_bytes, 4098.5 * 393_216.0);
        assert_eq!(work.attention_ops, 4098.5 * 393_216.0);
        assert_eq!(work.bytes(), 2_093_838_336.0 + work.kv_bytes);
    }

    #[test]
    fn prefill_reads_the_weights_once_a_chunk_and_the_head_once() {
        let account = account(Format::Q4, None);
        let one = account.prefill(0, 512, 512, 0);
        assert_eq!(one.weight_bytes * 512.0, 2_093_838_336.0);
        assert_eq!(one.kv_bytes, 393_216.0);
        assert_eq!(one.ops, 2.0 * (3_623_878_656.0 + 98_500_608.0 / 512.0));
        // A causal triangle: 256.5 positions a token, 1.4 % of the operations.
        assert_eq!(one.attention_ops, 256.5 * 393_216.0);
        assert!((one.attention_ops / one.ops - 0.0139).abs() < 1e-4);
        // Two chunks and a bit, at depth 100: the passes read 612, 1124 and 1125 positions.
        let three = account.prefill(100, 1025, 512, 0);
        let head = account.head.bytes as f64;
        let layers = account.layers.bytes as f64;
        assert_eq!(three.weight_bytes, (3.0 * layers + head) / 1025.0);
        let read = (612.0 + 1124.0 + 1125.0) * 393_216.0 / 1025.0;
        assert!((three.kv_bytes / read - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_window_bounds_what_is_read() {
        let work = account(Format::Q4, Some(2047)).decode(4000, 8);
        assert_eq!(work.kv_bytes, 2047.0 * 393_216.0);
        // Queries 4000..4008 see 1954..4008 together.
        let work = account(Format::Q4, Some(2047)).prefill(4000, 8, 512, 0);
        assert_eq!(work.kv_bytes * 8.0, 2054.0 * 393_216.0);
        assert_eq!(work.attention_ops, 2047.0 * 393_216.0);
    }

    /// Half of the layers of Phi-3-small see all 8001 keys. The others see 961 in the block of position 8000
    /// and the fifteen before it, and of the 110 blocks before those each head one in eight: 14 where the
    /// first is one of the first six, else 13. The four heads of a KV head see four different ones.
    #[test]
    fn of_a_block_sparse_layer_only_what_is_seen_counts() {
        let preset: phidias_models::synth::Preset = "phi-3-small-8k".parse().unwrap();
        let config = preset.configuration(None).unwrap();
        let none = Weights::default();
        let work =
            Account::new(&config, KvType::F16, none, none, Experts::default()).decode(8000, 1);
        // Heads 1 mod 8 begin with block 6, heads 0 mod 8 with block 7; the other six with 0 to 5.
        let strides = |head: usize| if head % 8 < 2 { 13 } else { 14 };
        let seen: usize = (0..32).map(|head| 961 + 64 * strides(head)).sum();
        let read = 8 * 961 + 64 * (0..32).map(strides).sum::<usize>();
        assert_eq!(
            work.attention_ops,
            (16 * (32 * 8001 + seen) * 4 * 128) as f64
        );
        assert_eq!(work.kv_bytes, (16 * (8 * 8001 + read) * 512) as f64);
    }

    #[test]
    fn of_the_experts_two_are_read_for_a_token_and_all_that_were_chosen_for_many() {
        let mut account = account(Format::Q4, None);
        account.experts = Experts {
            each: Weights {
                bytes: 1000,
                elements: 3000,
            },
            layers: 32,
        };
        let without = self::account(Format::Q4, None);
        let (work, rest) = (account.decode(0, 4), without.decode(0, 4));
        assert_eq!(work.weight_bytes - rest.weight_bytes, 64.0 * 1000.0);
        assert_eq!(work.ops - rest.ops, 2.0 * 64.0 * 3000.0);
        let (work, rest) = (
            account.prefill(0, 512, 512, 500),
            without.prefill(0, 512, 512, 0),
        );
        assert!((work.weight_bytes - rest.weight_bytes - 500_000.0 / 512.0).abs() < 1e-6);
        assert_eq!(work.ops - rest.ops, 2.0 * 64.0 * 3000.0);
    }

    #[cfg(feature = "fable")]
    #[test]
    fn the_account_of_an_opened_model_agrees_with_the_model() {
        let options = crate::OpenOptions {
            format: Some(crate::WeightFormat::Q8),
            ..Default::default()
        };
        let model = phidias_models::fable::open(options).unwrap();
        let account = Account::of(&model, KvType::F16);
        let work = account.decode(7, 1);
        assert_eq!(
            work.weight_bytes,
            model.transformer().bytes_per_token() as f64
        );
        // 5 layers of 256 x (512 + 256 + 1024 + 512), 4 KV heads of 32; vocabulary 4096.
        assert_eq!(account.layers.elements, 5 * 256 * (512 + 256 + 1024 + 512));
        assert_eq!(account.head.elements, 4096 * 256);
        assert_eq!(work.kv_bytes, 8.0 * (5 * 2 * 4 * 32 * 2) as f64);
    }
}
