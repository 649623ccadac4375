//! Prompts with pictures in them: `<|image_1|>`, `<|image_2|>`, ...
//!
//! The rules are the published processor's. The text is cut at the tags, and every piece is
//! encoded on its own with the tokenizer's default beginning: `<s>` stands at the head of every
//! piece, after every picture, and after one that ends the text. A tag becomes as many positions
//! as its picture has tokens. Tags count from 1 without gaps and there are as many different ones
//! as pictures.
//!
//! ```text
//! <|user|>\n<|image_1|>\nWhat?     [<s> <|user|> \n] [picture 0: 457 positions] [<s> \n What ?]
//! ```
//!
//! A tag may stand twice, and tags may be out of order; which features then go where is the
//! model's affair. One thing differs: with no pictures at all the reference reads tags as text;
//! here they are an error.

use std::collections::BTreeSet;

use super::error::TextError;
use super::tokenizer::{Bos, Tokenizer};

/// Most tags that an error lists.
const LISTED: usize = 8;

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Ids of text.
    Text(Vec<u32>),
    /// A picture.
    Image {
        /// Which one, from 0: `<|image_1|>` is 0.
        index: usize,
        /// Positions it takes.
        tokens: usize,
    },
}

impl Segment {
    /// Positions it takes.
    pub fn len(&self) -> usize {
        match self {
            Self::Text(ids) => ids.len(),
            Self::Image { tokens, .. } => *tokens,
        }
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parts of a prompt in their order. `image_tokens` holds the positions of each picture.
///
/// # Errors
/// [`TextError::ImageTags`]: the tags are not those of the pictures; as [`Tokenizer::encode`].
pub fn encode_with_images(
    tokenizer: &Tokenizer,
    text: &str,
    image_tokens: &[usize],
) -> Result<Vec<Segment>, TextError> {
    encode_more(tokenizer, text, tokenizer.default_bos(), 0, image_tokens)
}

/// The same for text that follows other text with `seen` pictures: its tags count on from there, and its
/// first piece begins as `bos` says.
pub(super) fn encode_more(
    tokenizer: &Tokenizer,
    text: &str,
    bos: Bos,
    seen: usize,
    image_tokens: &[usize],
) -> Result<Vec<Segment>, TextError> {
    let (pieces, tags) = split(text);
    check(&tags, seen, image_tokens.len())?;
    let mut segments = Vec::with_capacity(pieces.len() + tags.len());
    let mut tags = tags.into_iter();
    for (i, piece) in pieces.into_iter().enumerate() {
        let bos = if i == 0 { bos } else { tokenizer.default_bos() };
        segments.push(Segment::Text(tokenizer.encode(piece, bos)?));
        segments.extend(tags.next().map(|tag| Segment::Image {
            index: tag - 1,
            tokens: image_tokens[tag - 1 - seen],
        }));
    }
    Ok(segments)
}

/// The texts around the tags, one more than there are tags, and the numbers of the tags. A number
/// too large to be one is the largest there is, and wrong either way.
fn split(text: &str) -> (Vec<&str>, Vec<usize>) {
    const OPEN: &str = "<|image_";
    let (mut pieces, mut tags) = (Vec::new(), Vec::new());
    let mut piece_start = 0;
    for (open, _) in text.match_indices(OPEN) {
        let inside = &text[open + OPEN.len()..];
        let digits = inside
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(inside.len());
        let (number, rest) = inside.split_at(digits);
        let Some(rest) = rest.strip_prefix("|>") else {
            continue;
        };
        if number.is_empty() {
            continue;
        }
        tags.push(number.parse().unwrap_or(usize::MAX));
        pieces.push(&text[piece_start..open]);
        piece_start = text.len() - rest.len();
    }
    pieces.push(&text[piece_start..]);
    (pieces, tags)
}

fn check(tags: &[usize], seen: usize, images: usize) -> Result<(), TextError> {
    let distinct: BTreeSet<usize> = tags.iter().copied().collect();
    if distinct.iter().copied().eq(seen + 1..=seen + images) {
        return Ok(());
    }
    let list = |tags: &mut dyn Iterator<Item = usize>, count: usize| {
        let mut listed: Vec<_> = tags
            .take(LISTED)
            .map(|n| format!("<|image_{n}|>"))
            .collect();
        if count > LISTED {
            listed.push(format!("and {} more", count - LISTED));
        }
        match listed.is_empty() {
            true => "no image tag".into(),
            false => listed.join(" "),
        }
    };
    Err(TextError::ImageTags {
        images,
        expected: list(&mut (seen + 1..=seen + images), images),
        found: list(&mut distinct.iter().copied(), distinct.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture::{mini, vision};

    #[test]
    fn pieces_begin_with_bos_and_tags_become_positions() {
        let tokenizer = vision();
        let text = |text| Segment::Text(tokenizer.encode(text, Bos::Add).unwrap());
        let image = |index, tokens| Segment::Image { index, tokens };
        let found = encode_with_images(&tokenizer, "<|image_2|>a<|image_01|>", &[3, 5]).unwrap();
        let expected = [text(""), image(1, 5), text("a"), image(0, 3), text("")];
        assert_eq!(found, expected);
        assert_eq!(
            found.iter().map(Segment::len).sum::<usize>(),
            1 + 5 + 2 + 3 + 1
        );
        // The text models' tokenizer adds none.
        let found = encode_with_images(&mini(), "<|image_1|>", &[3]).unwrap();
        assert_eq!(
            found,
            [Segment::Text(vec![]), image(0, 3), Segment::Text(vec![])]
        );
        assert!(found[0].is_empty() && !found[1].is_empty());
    }

    #[test]
    fn what_is_not_quite_a_tag_is_text() {
        let plain = "<|image|><|image_|><|image_1|<|image_-1|><|image_1 |><|image_x1|> <|image_";
        assert_eq!(split(plain), (vec![plain], vec![]));
        let nested = "<|image_<|image_1|>|>é";
        assert_eq!(split(nested), (vec!["<|image_", "|>é"], vec![1]));
    }

    #[test]
    fn a_tag_may_stand_twice() {
        let found = encode_with_images(&vision(), "<|image_1|><|image_1|>", &[2]).unwrap();
        let images = found
            .iter()
            .filter(|s| matches!(s, Segment::Image { index: 0, .. }));
        assert_eq!((images.count(), found.len()), (2, 5));
    }

    #[test]
    fn tags_that_are_not_those_of_the_pictures() {
        let many: String = (1..=12).map(|n| format!("<|image_{n}|>")).collect();
        for (text, images, message) in [
            (
                "a",
                1,
                "1 image(s): expected the prompt to hold <|image_1|>, found no image tag",
            ),
            (
                "<|image_1|>",
                0,
                "0 image(s): expected the prompt to hold no image tag, found <|image_1|>",
            ),
            (
                "<|image_1|>",
                2,
                "expected the prompt to hold <|image_1|> <|image_2|>, found <|image_1|>",
            ),
            (
                "<|image_1|><|image_2|>",
                1,
                "hold <|image_1|>, found <|image_1|> <|image_2|>",
            ),
            (
                "<|image_3|><|image_1|>",
                2,
                "hold <|image_1|> <|image_2|>, found <|image_1|> <|image_3|>",
            ),
            ("<|image_0|>", 1, "hold <|image_1|>, found <|image_0|>"),
            (
                "<|image_99999999999999999999|>",
                1,
                "found <|image_18446744073709551615|>",
            ),
            (&many, 11, "<|image_8|> and 3 more, found <|image_1|> "),
        ] {
            let images = vec![1; images];
            let error = encode_with_images(&vision(), text, &images).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
