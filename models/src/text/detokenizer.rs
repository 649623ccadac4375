//! Ids one at a time to text, as soon as the text is certain.
//!
//! Most tokens stand for a fixed piece of text and are given out at once. The rest are
//! *fragments*: byte-fallback tokens (`<0xE4>`), and in byte-level vocabularies tokens that hold
//! part of a character. What a fragment stands for depends on its neighbours, and the decoder
//! judges a **run** of byte-fallback tokens as a whole: all of it is UTF-8, or every byte of it
//! becomes U+FFFD. So a run is held back until a token ends it. `\n` is such a byte in Llama's
//! vocabulary and therefore appears together with the token after it.
//!
//! Everything given out, put together, is exactly what decoding all ids at once gives. A step
//! costs the same however long the text has become: only the run is kept.

use super::error::TextError;
use super::tokenizer::{Special, Tokenizer};

/// Longest run of byte-level fragments that is tried at every step. A character has at most four
/// bytes; a longer run is not text, and waits for its end like the byte-fallback ones.
const LONGEST_TRIED_RUN: usize = 8;

/// Turns generated ids into text, token by token.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    special: Special,
    /// Fragments that wait for the end of their run.
    run: Vec<u32>,
    /// How many of them come from the prompt and were read by the user already.
    run_of_prompt: usize,
    /// No text yet: decoding will take a space off the first.
    at_start: bool,
}

impl Detokenizer {
    /// For ids that are a text of their own, such as the answer in a chat: the leading space of
    /// the first word is not part of it.
    pub fn new(tokenizer: &Tokenizer, special: Special) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            special,
            run: Vec::new(),
            run_of_prompt: 0,
            at_start: true,
        }
    }

    /// For ids that continue a prompt: together with the prompt's text the result reads as the
    /// whole decoded at once, so `▁world` after `▁Hello` gives `" world"`.
    ///
    /// A character may begin in the prompt and end in the continuation. It is then given out
    /// whole, after the U+FFFD that decoding the prompt alone shows for its first part. Prompt ids
    /// outside the vocabulary (places of images) stand for no text.
    ///
    /// # Errors
    /// [`TextError::Decode`].
    pub fn after(
        tokenizer: &Tokenizer,
        prompt_ids: &[u32],
        special: Special,
    ) -> Result<Self, TextError> {
        let mut this = Self::new(tokenizer, special);
        for &id in prompt_ids.iter().rev() {
            if tokenizer.check_id(id).is_err() || this.skips(id) {
                continue;
            }
            let piece = this.piece(id)?;
            if piece.is_fragment() {
                this.run.push(id);
            } else if !piece.text.is_empty() {
                this.at_start = false;
                break;
            }
        }
        this.run.reverse();
        this.run_of_prompt = this.run.len();
        Ok(this)
    }

    /// Takes the next id and gives the text that has become certain, often empty.
    ///
    /// # Errors
    /// [`TextError::UnknownId`] for an id outside the vocabulary, which then counts as not
    /// pushed; [`TextError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.tokenizer.check_id(id)?;
        if self.skips(id) {
            return Ok(String::new());
        }
        let piece = self.piece(id)?;
        if piece.is_fragment() {
            self.run.push(id);
            return self.try_run(&piece);
        }
        let mut text = self.finish()?;
        if self.at_start && !piece.text.is_empty() {
            self.at_start = false;
            text += &self.tokenizer.decode(&[id], Special::Keep)?;
        } else {
            text += &piece.text;
        }
        Ok(text)
    }

    /// Gives the text that was still held back: the ids end here. More may be pushed later; a run
    /// of bytes then begins anew.
    ///
    /// # Errors
    /// [`TextError::Decode`].
    pub fn finish(&mut self) -> Result<String, TextError> {
        let text = self.text_of_run()?;
        if !self.run.is_empty() {
            self.at_start = false;
        }
        self.run.clear();
        self.run_of_prompt = 0;
        Ok(text)
    }

    fn skips(&self, id: u32) -> bool {
        self.special == Special::Skip && self.tokenizer.is_special(id)
    }

    fn piece(&self, id: u32) -> Result<Piece, TextError> {
        Ok(Piece {
            byte: self
                .tokenizer
                .token_of(id)
                .is_some_and(|token| is_byte_fallback(&token)),
            text: self.tokenizer.decode_inside(&[id])?,
        })
    }

    /// A run of byte-level fragments ends as soon as it is whole characters.
    fn try_run(&mut self, last: &Piece) -> Result<String, TextError> {
        if last.byte || self.run.len() > LONGEST_TRIED_RUN {
            return Ok(String::new());
        }
        for &id in &self.run {
            if self.piece(id)?.byte {
                return Ok(String::new());
            }
        }
        if self
            .segment(&self.run)?
            .contains(char::REPLACEMENT_CHARACTER)
        {
            return Ok(String::new());
        }
        self.finish()
    }

    /// The text of the run, without what the prompt showed of it.
    fn text_of_run(&self) -> Result<String, TextError> {
        let (prompt, generated) = self.run.split_at(self.run_of_prompt);
        if generated.is_empty() {
            return Ok(String::new());
        }
        let joint = self.segment(&self.run)?;
        if prompt.is_empty() {
            return Ok(joint);
        }
        let shown = self.segment(prompt)?;
        if let Some(rest) = joint.strip_prefix(&shown) {
            return Ok(rest.to_owned());
        }
        if shown.contains(char::REPLACEMENT_CHARACTER) {
            return Ok(joint); // the prompt's half character is whole now
        }
        // The prompt's run was text and the generated bytes spoil it: it stays what was shown.
        self.tokenizer.decode_inside(generated)
    }

    fn segment(&self, ids: &[u32]) -> Result<String, TextError> {
        if self.at_start {
            self.tokenizer.decode(ids, Special::Keep)
        } else {
            self.tokenizer.decode_inside(ids)
        }
    }
}

/// A token and its text in the middle of a sentence.
struct Piece {
    byte: bool,
    text: String,
}

impl Piece {
    fn is_fragment(&self) -> bool {
        self.byte || self.text.contains(char::REPLACEMENT_CHARACTER)
    }
}

/// Whether a token is one that the `ByteFallback` decoder reads as a byte: `<0x0A>`.
fn is_byte_fallback(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture::{self, mini, vision};
    use crate::text::tiktoken::alphabet;
    use crate::text::tokenizer::Bos;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn stream(detokenizer: &mut Detokenizer, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = ids
            .iter()
            .map(|&id| detokenizer.push(id).unwrap())
            .collect();
        pieces.push(detokenizer.finish().unwrap());
        pieces
    }

    #[test]
    fn the_leading_space_belongs_to_a_continuation() {
        let tokenizer = mini();
        let [hello, world] = tokenizer.encode("Hello world", Bos::Omit).unwrap()[..] else {
            panic!("two words, two tokens")
        };
        let mut own = Detokenizer::new(&tokenizer, Special::Skip);
        assert_eq!(stream(&mut own, &[hello, world]), ["Hello", " world", ""]);
        let mut after = Detokenizer::after(&tokenizer, &[hello], Special::Skip).unwrap();
        assert_eq!(after.push(world).unwrap(), " world");
        // A prompt of which nothing is visible is no prompt.
        let mut after = Detokenizer::after(&tokenizer, &[1], Special::Skip).unwrap();
        assert_eq!(after.push(world).unwrap(), "world");
        let mut after = Detokenizer::after(&tokenizer, &[1], Special::Keep).unwrap();
        assert_eq!(after.push(world).unwrap(), " world");
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = mini();
        let ids = tokenizer.encode("x𝔾y", Bos::Omit).unwrap();
        let pieces = stream(&mut Detokenizer::new(&tokenizer, Special::Keep), &ids);
        assert_eq!(pieces, ["x", "", "", "", "", "𝔾y", ""]);
    }

    #[test]
    fn a_character_cut_by_the_end_is_replaced() {
        let tokenizer = mini();
        let ids = tokenizer.encode("x𝔾", Bos::Omit).unwrap();
        let pieces = stream(&mut Detokenizer::new(&tokenizer, Special::Keep), &ids[..3]);
        assert_eq!(pieces, ["x", "", "", "\u{FFFD}\u{FFFD}"]);
    }

    #[test]
    fn a_character_may_begin_in_the_prompt() {
        let tokenizer = mini();
        let ids = tokenizer.encode("x𝔾y", Bos::Omit).unwrap();
        let mut after = Detokenizer::after(&tokenizer, &ids[..2], Special::Keep).unwrap();
        assert_eq!(stream(&mut after, &ids[2..]).concat(), "𝔾y");
        // A prompt that ends with a line break keeps it, whatever bytes follow.
        let prompt = tokenizer.encode("x\n", Bos::Omit).unwrap();
        let mut after = Detokenizer::after(&tokenizer, &prompt, Special::Keep).unwrap();
        assert_eq!(stream(&mut after, &ids[1..3]).concat(), "\u{FFFD}\u{FFFD}");
        let mut after = Detokenizer::after(&tokenizer, &prompt, Special::Keep).unwrap();
        assert_eq!(stream(&mut after, &ids[1..]).concat(), "𝔾y");
    }

    #[test]
    fn ids_outside_the_vocabulary() {
        let mut detokenizer = Detokenizer::new(&mini(), Special::Keep);
        assert!(matches!(
            detokenizer.push(32011),
            Err(TextError::UnknownId { id: 32011, .. })
        ));
        assert_eq!(detokenizer.push(263).unwrap(), "a");
    }

    /// A byte-level vocabulary (the kind Phi-3-small has): one token per byte, so that every
    /// character but ASCII comes in fragments.
    #[test]
    fn byte_level_characters_come_as_soon_as_they_are_whole() {
        let tokenizer = byte_level();
        let text = "aé你𝔾 z";
        let ids = tokenizer.encode(text, Bos::Omit).unwrap();
        assert_eq!(ids.len(), text.len());
        let pieces = stream(&mut Detokenizer::new(&tokenizer, Special::Keep), &ids);
        assert_eq!(
            pieces,
            ["a", "", "é", "", "", "你", "", "", "", "𝔾", " ", "z", ""]
        );
    }

    fn byte_level() -> Tokenizer {
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(build_byte_level);
        TOKENIZER.clone()
    }

    fn build_byte_level() -> Tokenizer {
        let vocab: serde_json::Map<_, _> = (alphabet().into_iter().zip(0..))
            .map(|(letter, id): (_, u32)| (letter.to_string(), id.into()))
            .collect();
        let json = fixture::edited_tokenizer_json(|json| {
            let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": false});
            json["added_tokens"] = serde_json::json!([]);
            json["normalizer"] = ().into();
            json["pre_tokenizer"] = level.clone();
            json["decoder"] = level;
            json["post_processor"] = ().into();
            json["model"] = serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []});
        });
        Tokenizer::from_bytes(&json, None, "byte level").unwrap()
    }

    /// Ids that lean towards what is difficult: bytes, spaces, special tokens.
    fn difficult_ids(max_id: u32) -> impl Strategy<Value = Vec<u32>> {
        let id = prop_oneof![
            4 => 3..259u32,
            1 => Just(13u32),
            1 => Just(29871u32),
            1 => prop::sample::select(vec![263u32, 259, 1678, 3186, 30140]),
            2 => prop::sample::select(vec![0u32, 1, 2, 32000, 32001, 32007, 32010]),
            2 => 0..=max_id,
        ];
        prop::collection::vec(id, 0..24)
    }

    fn agrees(tokenizer: &Tokenizer, ids: &[u32], split: usize, special: Special) {
        let whole = tokenizer.decode(ids, special).unwrap();
        let pieces = stream(&mut Detokenizer::new(tokenizer, special), ids);
        assert_eq!(pieces.concat(), whole, "{ids:?}");
        let (prompt, generated) = ids.split_at(split);
        let mut after = Detokenizer::after(tokenizer, prompt, special).unwrap();
        let continued = stream(&mut after, generated).concat();
        // Where the prompt ends inside a character, its own text is no prefix of the whole.
        if let Some(rest) = whole.strip_prefix(&tokenizer.decode(prompt, special).unwrap()) {
            assert_eq!(continued, rest, "{prompt:?} {generated:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn pieces_make_the_whole(ids in difficult_ids(32010), cut in 0.0..=1.0f64) {
            let split = (ids.len() as f64 * cut) as usize;
            for special in [Special::Keep, Special::Skip] {
                agrees(&mini(), &ids, split, special);
                agrees(&vision(), &ids, split, special);
            }
        }

        #[test]
        fn byte_level_pieces_make_the_whole(bytes: Vec<u8>, text: String, cut in 0.0..=1.0f64) {
            let tokenizer = byte_level();
            for ids in [bytes, text.into_bytes()] {
                let ids: Vec<u32> = ids.into_iter().map(u32::from).collect();
                let split = (ids.len() as f64 * cut) as usize;
                agrees(&tokenizer, &ids, split, Special::Keep);
            }
        }
    }

    /// A decoder that joins letters across tokens has no text for a token alone.
    #[test]
    fn a_decoder_that_looks_across_tokens_is_refused() {
        let json = fixture::edited_tokenizer_json(|json| {
            json["decoder"] = serde_json::json!({"type": "Sequence", "decoders": [
                {"type": "Fuse"},
                {"type": "Replace", "pattern": {"String": "ab"}, "content": "x"},
            ]});
        });
        let tokenizer = Tokenizer::from_bytes(&json, None, "here").unwrap();
        let mut detokenizer = Detokenizer::new(&tokenizer, Special::Keep);
        let error = detokenizer.push(tokenizer.id_of("b").unwrap()).unwrap_err();
        assert!(matches!(error, TextError::Decode { .. }), "{error}");
    }

    /// A step does not become dearer as the text grows, nor inside an endless run of bytes.
    #[test]
    fn only_the_run_is_kept() {
        let mut detokenizer = Detokenizer::new(&mini(), Special::Keep);
        for _ in 0..2000 {
            detokenizer.push(263).unwrap();
            assert!(detokenizer.run.is_empty());
        }
        for _ in 0..20_000 {
            assert_eq!(detokenizer.push(13).unwrap(), "");
        }
        assert_eq!(detokenizer.push(263).unwrap(), "\n".repeat(20_000) + " a");
        assert!(detokenizer.run.is_empty());
    }
}
