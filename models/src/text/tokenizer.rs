//! Text to ids and back.
//!
//! Phi-3 mini, medium, MoE and vision use Llama's byte-pair vocabulary of 32 000 with added tokens
//! (`<|user|>`, `<|end|>`, ...) above it. Three of its habits matter to whoever uses the ids:
//!
//! * **Segments.** Added tokens cut a text into segments, and each segment gets a leading `▁`
//!   (the vocabulary's space): `"<|user|>Hi"` and `"<|user|> Hi"` encode alike. Decoding takes
//!   back one leading space of the *whole*, so decoding is not the inverse of encoding.
//! * **`rstrip`.** An added token with this flag swallows the white space after it. Which tokens
//!   have it differs between published folders; each folder's own `tokenizer.json` decides.
//! * **Byte fallback.** A character outside the vocabulary becomes one token per UTF-8 byte,
//!   `<0xE4> <0xBD> <0xA0>`. So does `\n`, always.
//!
//! Phi-3-small has GPT-4's byte-level vocabulary instead, from a [`.tiktoken` file](super::tiktoken):
//! every byte is a token, spaces belong to the words after them, and decoding undoes encoding.
//!
//! Text that contains the spelling of an added token (`<|end|>` in what a user typed) encodes to
//! that token, as in the reference.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use serde::de::IgnoredAny;
use tokenizers::PostProcessorWrapper;

use super::error::TextError;
use super::files::{self, TokenizerConfig};
use super::growth::growth;
use super::tiktoken;
use crate::foreign::caught;

/// Longest text that is encoded at once. Encoding needs memory of about a hundred times the text;
/// the longest context of the family holds about half a megabyte.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// Longest text after the replacements of a tokenizer, at their worst. Phi's make the longest text up to
/// twelve times longer.
const MAX_NORMALIZED_BYTES: usize = 12 * MAX_TEXT_BYTES;
/// Most times that a decoder may make a token's text longer. Phi's makes it shorter.
const MAX_DECODER_GROWTH: f64 = 16.0;

/// Whether the beginning-of-sequence token goes before a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bos {
    /// Put it there, unless the text already begins with it.
    Add,
    /// Leave the text as it is.
    Omit,
}

/// What decoding does with special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Write them out: `<|end|>`.
    Keep,
    /// Leave them out.
    Skip,
}

/// A folder's tokenizer. Cloning it is cheap: the clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    origin: String,
    vocab_size: usize,
    max_id: u32,
    max_token: String,
    special: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    default_bos: Bos,
    anchor: Option<Anchor>,
    /// Longest run of white space that is encoded, in characters.
    max_space: Option<usize>,
    /// How many times longer a text becomes before it is cut into tokens, at most.
    growth: f64,
}

/// An ordinary token and its text. Decoding `[anchor, id]` and taking the anchor's text off again
/// gives the text of `id` inside a sentence, which decoding `[id]` alone would strip of its space.
struct Anchor {
    id: u32,
    text: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, or else its one `.tiktoken` file with the special
    /// tokens of Phi-3-small, and `tokenizer_config.json` where there is one. `None`: the folder
    /// has neither.
    ///
    /// # Errors
    /// [`TextError`]: a file cannot be read, is malformed, or names tokens that do not exist.
    pub fn open(dir: &Path) -> Result<Option<Self>, TextError> {
        let config_path = dir.join("tokenizer_config.json");
        let config_origin = config_path.display().to_string();
        let path = dir.join("tokenizer.json");
        if let Some(bytes) = files::read(&path, files::MAX_TOKENIZER_BYTES)? {
            let origin = path.display().to_string();
            let inner = parse(&bytes, &origin)?;
            let config = TokenizerConfig::open(&config_path)?;
            return Self::new(inner, &origin, config, &config_origin, None).map(Some);
        }
        let Some((inner, origin)) = tiktoken::open(dir)? else {
            return Ok(None);
        };
        let mut config = TokenizerConfig::open(&config_path)?;
        for token in [&mut config.bos_token, &mut config.eos_token] {
            token.get_or_insert_with(|| tiktoken::END_OF_TEXT.into());
        }
        let max_space = Some(tiktoken::MAX_SPACE);
        Self::new(inner, &origin, config, &config_origin, max_space).map(Some)
    }

    /// A `tokenizer.json` from its contents, and `tokenizer_config.json` likewise; `origin` names
    /// them in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
        origin: &str,
    ) -> Result<Self, TextError> {
        let config = match tokenizer_config_json {
            Some(bytes) => TokenizerConfig::parse(bytes, origin)?,
            None => TokenizerConfig::default(),
        };
        Self::new(parse(tokenizer_json, origin)?, origin, config, origin, None)
    }

    fn new(
        mut inner: tokenizers::Tokenizer,
        origin: &str,
        config: TokenizerConfig,
        config_origin: &str,
        max_space: Option<usize>,
    ) -> Result<Self, TextError> {
        let unusable = |reason| TextError::Tokenizer {
            origin: origin.into(),
            reason,
        };
        // A file may ask for texts to be cut or padded to some length: never silently.
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(unusable)?;

        let template_bos = inner.get_post_processor().and_then(leading_id);
        // The ids of `encode` are those of the text alone; what goes before it is `Bos`'s affair.
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let growth_of = |step: serde_json::Result<serde_json::Value>| match step {
            Ok(step) => Ok(growth(&step)),
            Err(error) => Err(unusable(error.to_string())),
        };
        let decoder_growth = growth_of(serde_json::to_value(inner.get_decoder()))?;
        if decoder_growth > MAX_DECODER_GROWTH {
            return Err(unusable(format!(
                "its decoder makes a text up to {decoder_growth} times longer, expected at most \
                 {MAX_DECODER_GROWTH} times"
            )));
        }

        let vocab = inner.get_vocab(true);
        let Some((max_token, &max_id)) = vocab.iter().max_by_key(|(_, id)| **id) else {
            return Err(unusable("it has no tokens".into()));
        };
        let named = |field, token: Option<String>| match token {
            None => Ok(None),
            Some(token) => match inner.token_to_id(&token) {
                Some(id) => Ok(Some(id)),
                None => Err(TextError::UnknownToken {
                    origin: config_origin.into(),
                    field,
                    token,
                }),
            },
        };
        let bos = named("bos_token", config.bos_token)?.or(template_bos);
        let add_bos = config.add_bos_token.unwrap_or(template_bos.is_some());
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        Ok(Self {
            shared: Arc::new(Shared {
                vocab_size: inner.get_vocab_size(true),
                max_id,
                max_token: max_token.clone(),
                special,
                bos,
                eos: named("eos_token", config.eos_token)?,
                default_bos: if add_bos && bos.is_some() {
                    Bos::Add
                } else {
                    Bos::Omit
                },
                anchor: find_anchor(&inner),
                max_space,
                growth: growth_of(serde_json::to_value(inner.get_normalizer()))?,
                origin: origin.into(),
                inner,
            }),
        })
    }

    /// The ids of a text. Special tokens spelled out in it are recognised.
    ///
    /// # Errors
    /// [`TextError::TextTooLong`], [`TextError::GrownTooLong`] and [`TextError::SpaceTooLong`]; [`TextError::NoBos`] when [`Bos::Add`] is asked of a tokenizer
    /// that names no such token; [`TextError::Encode`].
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TextTooLong {
                bytes: text.len(),
                limit: MAX_TEXT_BYTES,
            });
        }
        if text.len() as f64 * self.shared.growth > MAX_NORMALIZED_BYTES as f64 {
            return Err(TextError::GrownTooLong {
                origin: self.origin().into(),
                bytes: text.len(),
                growth: self.shared.growth,
                limit: MAX_NORMALIZED_BYTES,
            });
        }
        if let Some(limit) = self.shared.max_space {
            let runs = text.split(|c: char| !c.is_whitespace());
            // No run has more characters than bytes.
            for run in runs.filter(|run| run.len() > limit) {
                let chars = run.chars().count();
                if chars > limit {
                    return Err(TextError::SpaceTooLong { chars, limit });
                }
            }
        }
        let encoding =
            guarded(|| self.shared.inner.encode_fast(text, false)).map_err(|reason| {
                TextError::Encode {
                    origin: self.origin().into(),
                    reason,
                }
            })?;
        let mut ids = encoding.get_ids().to_vec();
        if bos == Bos::Add {
            let bos_id = self.bos_id().ok_or_else(|| TextError::NoBos {
                origin: self.origin().into(),
            })?;
            if ids.first() != Some(&bos_id) {
                ids.insert(0, bos_id);
            }
        }
        Ok(ids)
    }

    /// The text of ids, as a whole of its own: one leading space is taken off.
    ///
    /// # Errors
    /// [`TextError::UnknownId`] for an id outside the vocabulary; [`TextError::Decode`].
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, TextError> {
        ids.iter().try_for_each(|&id| self.check_id(id))?;
        guarded(|| self.shared.inner.decode(ids, special == Special::Skip)).map_err(|reason| {
            TextError::Decode {
                origin: self.origin().into(),
                reason,
            }
        })
    }

    /// The text of ids in the middle of a text: nothing is stripped, special tokens are kept.
    pub(super) fn decode_inside(&self, ids: &[u32]) -> Result<String, TextError> {
        let Some(anchor) = &self.shared.anchor else {
            return self.decode(ids, Special::Keep);
        };
        let mut anchored = Vec::with_capacity(ids.len() + 1);
        anchored.push(anchor.id);
        anchored.extend_from_slice(ids);
        let text = self.decode(&anchored, Special::Keep)?;
        match text.strip_prefix(&anchor.text) {
            Some(rest) => Ok(rest.to_owned()),
            None => Err(TextError::Decode {
                origin: self.origin().into(),
                reason: format!("the text of id {} depends on what follows it", anchor.id),
            }),
        }
    }

    /// Whether a text encoded without further instructions gets a beginning-of-sequence token:
    /// `add_bos_token` of `tokenizer_config.json`, or else what `tokenizer.json` itself does.
    pub fn default_bos(&self) -> Bos {
        self.shared.default_bos
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// The largest id of any token. Ids may have gaps, so this is not `vocab_size() - 1`.
    pub fn max_id(&self) -> u32 {
        self.shared.max_id
    }

    /// The id of a token, spelled as in the vocabulary (`"▁the"`, `"<|end|>"`).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// The beginning-of-sequence token, where one is named.
    pub fn bos_id(&self) -> Option<u32> {
        self.shared.bos
    }

    /// The end-of-sequence token, where one is named.
    pub fn eos_id(&self) -> Option<u32> {
        self.shared.eos
    }

    /// Whether a token is special: [`Special::Skip`] leaves it out. (An added token need not be:
    /// Phi's `</s>` is an ordinary word to the decoder.)
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.contains(&id)
    }

    /// The file this tokenizer was read from, for messages.
    pub fn origin(&self) -> &str {
        &self.shared.origin
    }

    /// Checks that every token has a row in an embedding matrix `[embedding_rows, hidden]`. More
    /// rows than tokens are usual: matrices are padded.
    ///
    /// # Errors
    /// [`TextError::MoreIdsThanRows`] with both numbers.
    pub fn check_rows(&self, embedding_rows: usize) -> Result<(), TextError> {
        let shared = &*self.shared;
        if (shared.max_id as usize) < embedding_rows {
            return Ok(());
        }
        Err(TextError::MoreIdsThanRows {
            origin: shared.origin.clone(),
            token: shared.max_token.clone(),
            max_id: shared.max_id,
            rows: embedding_rows,
        })
    }

    /// Checks that an id stands for a token.
    ///
    /// # Errors
    /// [`TextError::UnknownId`].
    pub fn check_id(&self, id: u32) -> Result<(), TextError> {
        match self.shared.inner.id_to_token(id) {
            Some(_) => Ok(()),
            None => Err(TextError::UnknownId {
                origin: self.origin().into(),
                id,
                max_id: self.shared.max_id,
            }),
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.shared.origin)
            .field("vocab_size", &self.shared.vocab_size)
            .finish_non_exhaustive()
    }
}

fn parse(tokenizer_json: &[u8], origin: &str) -> Result<tokenizers::Tokenizer, TextError> {
    guarded(|| tokenizers::Tokenizer::from_bytes(tokenizer_json)).map_err(|reason| {
        // The library panics at some places where the JSON breaks off, and says of others that no variant fits.
        let broken = serde_json::from_slice::<IgnoredAny>(tokenizer_json).err();
        TextError::Tokenizer {
            origin: origin.into(),
            reason: broken.map_or(reason, |error| error.to_string()),
        }
    })
}

/// Calls into the `tokenizers` library. It checks a file part by part and trusts that the parts
/// agree (`expect` in its code); should they not, that is the file's fault and an error here.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match caught(call) {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("its parts contradict each other".into()),
    }
}

/// The id that a post-processor of the kind `TemplateProcessing` puts before a text, if any. Read
/// from its description: the library panics when asked to run one that names an unknown token.
fn leading_id(processor: &PostProcessorWrapper) -> Option<u32> {
    match processor {
        PostProcessorWrapper::Template(template) => {
            let template = serde_json::to_value(template).ok()?;
            let token = template.pointer("/single/0/SpecialToken/id")?.as_str()?;
            let ids = template.get("special_tokens")?.get(token)?.get("ids")?;
            u32::try_from(ids.get(0)?.as_u64()?).ok()
        }
        PostProcessorWrapper::Sequence(sequence) => sequence.as_ref().iter().find_map(leading_id),
        _ => None,
    }
}

/// Finds an ordinary token whose text does not change when another follows: a letter, or else the
/// first token of the vocabulary that will do.
fn find_anchor(inner: &tokenizers::Tokenizer) -> Option<Anchor> {
    let anchor = |id: u32| {
        let decode = |ids: &[u32]| guarded(|| inner.decode(ids, false)).ok();
        let text = decode(&[id])?;
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let twice = decode(&[id, id])?;
        (plain && twice.starts_with(&text)).then_some(Anchor { id, text })
    };
    inner
        .token_to_id("a")
        .and_then(anchor)
        .or_else(|| (0..inner.get_vocab_size(false) as u32).find_map(anchor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture::{self, mini, vision};

    #[test]
    fn bos_is_added_once() {
        let tokenizer = vision();
        assert_eq!(tokenizer.default_bos(), Bos::Add);
        assert_eq!(tokenizer.encode("a", Bos::Omit).unwrap(), [263]);
        assert_eq!(tokenizer.encode("a", Bos::Add).unwrap(), [1, 263]);
        assert_eq!(tokenizer.encode("<s>a", Bos::Add).unwrap(), [1, 263]);
        assert_eq!(tokenizer.encode("", Bos::Add).unwrap(), [1]);
    }

    #[test]
    fn config_decides_about_bos_and_names_both_ends() {
        let config = br#"{"add_bos_token": false, "bos_token": {"content": "<s>"},
                          "eos_token": "<|endoftext|>"}"#;
        let tokenizer =
            Tokenizer::from_bytes(&fixture::tokenizer_json(), Some(config), "here").unwrap();
        assert_eq!(tokenizer.default_bos(), Bos::Omit);
        assert_eq!(
            (tokenizer.bos_id(), tokenizer.eos_id()),
            (Some(1), Some(32000))
        );
        // Without a config, the post-processor of tokenizer.json speaks.
        let tokenizer = Tokenizer::from_bytes(&fixture::tokenizer_json(), None, "here").unwrap();
        assert_eq!(tokenizer.default_bos(), Bos::Add);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), None));
    }

    #[test]
    fn vocabulary_is_measured() {
        let (vision, mini) = (vision(), mini());
        assert_eq!((vision.vocab_size(), vision.max_id()), (32045, 32044));
        assert_eq!((mini.vocab_size(), mini.max_id()), (32011, 32010));
        assert_eq!(mini.id_of("<|end|>"), Some(32007));
        assert_eq!(mini.token_of(32007).as_deref(), Some("<|end|>"));
        assert_eq!(mini.token_of(32011), None);
        assert!(mini.is_special(32007) && !mini.is_special(2) && !mini.is_special(263));
        mini.check_rows(32064).unwrap();
        mini.check_rows(32011).unwrap();
        let error = mini.check_rows(32010).unwrap_err().to_string();
        assert!(
            error.contains("<|user|>") && error.contains("32010 embedding rows"),
            "{error}"
        );
    }

    /// Truncation and padding that a file asks for would lose text in silence.
    #[test]
    fn truncation_in_the_file_is_not_obeyed() {
        let json = fixture::edited_tokenizer_json(|json| {
            json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 2,
                "strategy": "LongestFirst", "stride": 0});
            json["padding"] = serde_json::json!({"strategy": {"Fixed": 8}, "direction": "Right",
                "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
        });
        let tokenizer = Tokenizer::from_bytes(&json, None, "here").unwrap();
        assert_eq!(tokenizer.encode("a b c d", Bos::Omit).unwrap().len(), 4);
    }

    #[test]
    fn too_long_a_text_is_refused() {
        let error = mini()
            .encode(&"a".repeat(MAX_TEXT_BYTES + 1), Bos::Omit)
            .unwrap_err();
        assert!(matches!(error, TextError::TextTooLong { bytes, limit }
            if bytes == limit + 1 && limit == MAX_TEXT_BYTES));
    }

    #[test]
    fn no_bos_named() {
        let json = fixture::edited_tokenizer_json(|json| json["post_processor"] = ().into());
        let tokenizer = Tokenizer::from_bytes(&json, None, "here").unwrap();
        assert_eq!(tokenizer.default_bos(), Bos::Omit);
        assert!(matches!(
            tokenizer.encode("a", Bos::Add),
            Err(TextError::NoBos { .. })
        ));
    }

    /// A vocabulary that cannot write a character, and names no token for such a case.
    #[test]
    fn characters_that_cannot_be_written() {
        let json = fixture::edited_tokenizer_json(|json| {
            json["model"]["byte_fallback"] = false.into();
            json["model"]["unk_token"] = "nowhere".into();
        });
        let tokenizer = Tokenizer::from_bytes(&json, None, "here").unwrap();
        assert_eq!(tokenizer.encode("a", Bos::Omit).unwrap(), [263]);
        let error = tokenizer.encode("𝔾", Bos::Omit).unwrap_err();
        assert!(matches!(error, TextError::Encode { .. }), "{error}");
    }

    #[test]
    fn ids_outside_the_vocabulary() {
        for id in [32011, u32::MAX] {
            let error = mini().decode(&[263, id], Special::Keep).unwrap_err();
            assert!(
                matches!(error, TextError::UnknownId { id: found, max_id: 32010, .. } if found == id)
            );
        }
    }

    #[test]
    fn malformed_tokenizers() {
        let whole = fixture::tokenizer_json();
        for bad in [
            &b""[..],
            b"{}",
            b"[1]",
            b"\xff\xfe",
            &whole[..whole.len() / 2],
        ] {
            let error = Tokenizer::from_bytes(bad, None, "here").unwrap_err();
            assert!(matches!(error, TextError::Tokenizer { .. }), "{error}");
        }
    }

    /// Contradictions inside a well-formed file: an error now or later, or a tokenizer that works,
    /// but no panic.
    #[test]
    fn contradictory_tokenizers_do_not_panic() {
        type Edit = fn(&mut serde_json::Value);
        let edits: &[Edit] = &[
            |json| json["model"]["merges"][0] = "no such".into(),
            |json| json["model"]["merges"][0] = "nospace".into(),
            |json| json["model"]["unk_token"] = "nowhere".into(),
            |json| json["model"]["vocab"] = serde_json::json!({}),
            |json| json["model"]["vocab"]["a"] = u32::MAX.into(),
            |json| json["model"]["vocab"]["a"] = 0.into(),
            |json| json["model"]["byte_fallback"] = false.into(),
            |json| json["added_tokens"][0]["id"] = 77.into(),
            |json| json["added_tokens"][0]["content"] = "".into(),
            |json| json["added_tokens"][3]["id"] = u32::MAX.into(),
            |json| json["added_tokens"][4]["normalized"] = true.into(),
            |json| json["post_processor"]["special_tokens"] = serde_json::json!({}),
            |json| json["post_processor"]["special_tokens"]["<s>"]["ids"] = serde_json::json!([]),
            |json| json["normalizer"] = ().into(),
            |json| json["decoder"] = ().into(),
            |json| json["decoder"] = serde_json::json!({"type": "ByteLevel"}),
            |json| {
                json["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel",
                "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
            },
        ];
        for edit in edits {
            let json = fixture::edited_tokenizer_json(edit);
            let Ok(tokenizer) = Tokenizer::from_bytes(&json, None, "here") else {
                continue;
            };
            let _ = tokenizer.encode("<s>a <unk>\n你 <|end|>\n b", Bos::Add);
            let _ = tokenizer.decode(&[1, 263, 13, 32007, 77], Special::Skip);
            let _ = tokenizer.decode_inside(&[263]);
        }
    }

    /// Each took all memory, and the process with it.
    #[test]
    fn replacements_without_measure_are_refused() {
        let tens = |list: &str| {
            let ten = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(10)});
            serde_json::json!({"type": "Sequence", list: vec![ten; 12]})
        };
        let json = fixture::edited_tokenizer_json(|json| json["normalizer"] = tens("normalizers"));
        let error = Tokenizer::from_bytes(&json, None, "here")
            .and_then(|tokenizer| tokenizer.encode("a", Bos::Omit))
            .unwrap_err();
        assert!(
            matches!(
                error,
                TextError::GrownTooLong {
                    bytes: 1,
                    growth: 1e12,
                    ..
                }
            ),
            "{error}"
        );
        let json = fixture::edited_tokenizer_json(|json| json["decoder"] = tens("decoders"));
        let error = Tokenizer::from_bytes(&json, None, "here").unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("up to 1000000000000 times longer, expected at most 16"),
            "{message}"
        );
    }

    /// The longest text that may be encoded at all is not too long for the family's own.
    #[test]
    fn replacements_of_the_family_are_not_refused() {
        for tokenizer in [mini(), vision()] {
            let shared = &tokenizer.shared;
            assert!(shared.growth * MAX_TEXT_BYTES as f64 <= MAX_NORMALIZED_BYTES as f64);
            let decoder = serde_json::to_value(shared.inner.get_decoder()).unwrap();
            assert!(growth(&decoder) <= MAX_DECODER_GROWTH / 10.0);
        }
    }

    #[test]
    fn malformed_configs() {
        let json = fixture::tokenizer_json();
        let open = |config: &str| {
            Tokenizer::from_bytes(&json, Some(config.as_bytes()), "here").unwrap_err()
        };
        for bad in ["", "[]", "{", "3"] {
            assert!(matches!(open(bad), TextError::Json { .. }));
        }
        for (bad, named) in [
            (r#"{"add_bos_token": "yes"}"#, "add_bos_token"),
            (r#"{"bos_token": 1}"#, "bos_token"),
            (r#"{"eos_token": {"content": 1}}"#, "eos_token"),
            (r#"{"chat_template": 1}"#, "chat_template"),
            (
                r#"{"chat_template": [{"name": "default"}]}"#,
                "chat_template",
            ),
        ] {
            assert!(matches!(open(bad), TextError::Field { field, .. } if field == named));
        }
        let error = open(r#"{"bos_token": "<none>"}"#);
        assert!(
            matches!(
                error,
                TextError::UnknownToken {
                    field: "bos_token",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Tokenizer::open(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("tokenizer.json"), fixture::tokenizer_json()).unwrap();
        assert_eq!(Tokenizer::open(dir.path()).unwrap().unwrap().eos_id(), None);
        let config = dir.path().join("tokenizer_config.json");
        std::fs::write(&config, r#"{"eos_token": "<|end|>"}"#).unwrap();
        assert_eq!(
            Tokenizer::open(dir.path()).unwrap().unwrap().eos_id(),
            Some(32007)
        );
        std::fs::write(&config, "{").unwrap();
        let error = Tokenizer::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");

        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        std::fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
        assert!(matches!(
            Tokenizer::open(dir.path()),
            Err(TextError::Read { .. })
        ));
    }
}
