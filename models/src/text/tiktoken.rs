//! The tokenizer of Phi-3-small, from a `.tiktoken` file.
//!
//! The file lists tokens by rank, one a line, `base64 rank`; a token's rank is its id. Encoding
//! cuts a text into words ([`PATTERN`]), begins with a word's bytes, and as long as two neighbours
//! together are a token, joins those whose token has the lowest rank. That is byte-pair encoding
//! with the merges left out: any two parts may join, if only their bytes are listed. The
//! `tokenizers` library wants the merges spelled out, one pair for each token, and they can be
//! found:
//!
//! > Encode token `T` itself with the ranks below its own. If two parts `a b` are left, `a b → T`
//! > is the only merge that ever makes `T`.
//!
//! For let `T` be the lowest rank in sight while a text is encoded. No part crosses the borders of
//! `T`, so the joins inside it were made in the order they are made in `T` alone; those of lower
//! ranks are all done; and none of a higher rank has been, as `T` was always the better choice.
//! So the parts inside are `a b`. A token for which more than two parts are left could be reached
//! by way of higher ranks only; no learnt vocabulary has one, and a file that does is refused.
//! (A word that is a token as a whole is that token, without merging: `ignore_merges`.)
//!
//! The ranks of cl100k_base fill the ids below 100 256. The 96 above are special, and all of
//! them are recognised in texts; the model uses five.

use std::array;
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokenizers::models::bpe::{BPE, MergeMap, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::error::TextError;
use super::files;

/// Ids of ordinary tokens, from 0.
pub(crate) const RANKS: u32 = 100_256;
/// Beginning and end of a sequence, where `tokenizer_config.json` names no other.
pub(crate) const END_OF_TEXT: &str = "<|endoftext|>";
/// Longest run of white space in a text, in characters. Finding its last character takes the
/// regular expression one place of a stack for each; the stack of `fancy-regex` ends at a million,
/// and the rest of the text would go uncut, and get other ids, without a word.
pub(super) const MAX_SPACE: usize = 500_000;

/// Longest token, in bytes: those of the published vocabulary end at 128.
const MAX_TOKEN_BYTES: usize = 128;
/// Bytes of base64 that the longest token has.
const MAX_BASE64_BYTES: usize = MAX_TOKEN_BYTES.div_ceil(3) * 4;

/// How cl100k_base cuts a text into words: a contraction's end; letters, with one character
/// before them; up to three digits; other characters, with a space before and line ends after;
/// white space as far as the last line end; white space but for the last before a word.
const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// The special tokens, from id [`RANKS`] on. Source: `tokenization_phi3_small.py` of
/// <https://huggingface.co/microsoft/Phi-3-small-8k-instruct>.
pub(crate) fn special_tokens() -> impl Iterator<Item = String> {
    let dummies = |ids: RangeInclusive<u32>| ids.map(|i| format!("<|dummy_id_{i}|>"));
    let named = |names: &'static [&str]| names.iter().map(|name| format!("<|{name}|>"));
    dummies(2..=2)
        .chain(named(&["endoftext"]))
        .chain(named(&["fim_prefix", "fim_middle", "fim_suffix"]))
        .chain(named(&["system", "user", "assistant"]))
        .chain(dummies(0..=1))
        .chain(named(&["end"]))
        .chain(dummies(3..=11))
        .chain(named(&["endofprompt"]))
        .chain(dummies(12..=86))
}

/// The tokenizer of a folder's `.tiktoken` file and the file's name; `None`: there is no such file.
pub(super) fn open(dir: &Path) -> Result<Option<(tokenizers::Tokenizer, String)>, TextError> {
    let failed = |source| TextError::Read {
        path: dir.to_owned(),
        source,
    };
    let entries = match dir.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|kind| kind == "tiktoken") {
            paths.push(path);
        }
    }
    let path = match &paths[..] {
        [] => return Ok(None),
        [path] => path,
        _ => {
            let name = |path: &PathBuf| Some(path.file_name()?.display().to_string());
            let mut found: Vec<String> = paths.iter().filter_map(name).collect();
            found.sort();
            return Err(TextError::SeveralVocabularies {
                path: dir.to_owned(),
                found,
            });
        }
    };
    let Some(bytes) = files::read(path, files::MAX_TIKTOKEN_BYTES)? else {
        return Ok(None);
    };
    let origin = path.display().to_string();
    Ok(Some((tokenizer(&bytes, &origin)?, origin)))
}

/// The tokenizer of the bytes of a `.tiktoken` file.
fn tokenizer(bytes: &[u8], origin: &str) -> Result<tokenizers::Tokenizer, TextError> {
    let ranks = Ranks::parse(bytes, origin)?;
    if ranks.tokens.len() != RANKS as usize {
        return Err(TextError::VocabularySize {
            origin: origin.into(),
            line: ranks.lines.last().copied().unwrap_or(0),
            expected: RANKS,
            found: ranks.tokens.len() as u32,
        });
    }
    let merges = ranks.merges(origin)?;
    build(ranks.ids, merges).map_err(|error| TextError::Tokenizer {
        origin: origin.into(),
        reason: error.to_string(),
    })
}

fn build(vocab: Vocab, merges: Merges) -> tokenizers::Result<tokenizers::Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(true)
        .build()?;
    let words = Split::new(
        SplitPattern::Regex(PATTERN.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let level = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(vec![
            PreTokenizerWrapper::Split(words),
            PreTokenizerWrapper::ByteLevel(level),
        ])))
        .with_decoder(Some(level));
    // They get the ids above the model's, in this order.
    tokenizer.add_special_tokens(special_tokens().map(|token| AddedToken::from(token, true)))?;
    Ok(tokenizer)
}

/// The tokens of a file, all different, in the order of their ranks.
struct Ranks {
    tokens: Vec<Vec<u8>>,
    /// The line of each, from 1.
    lines: Vec<usize>,
    /// Ranks by the token's letters in [`alphabet`].
    ids: Vocab,
}

impl Ranks {
    /// Reads the lines. Empty ones do not count, as in the reference.
    fn parse(bytes: &[u8], origin: &str) -> Result<Self, TextError> {
        let alphabet = alphabet();
        let mut ranks = Self {
            tokens: Vec::new(),
            lines: Vec::new(),
            ids: Vocab::default(),
        };
        for (line, text) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            if text.is_empty() {
                continue;
            }
            let rank = ranks.tokens.len() as u32;
            if rank == RANKS {
                return Err(TextError::VocabularySize {
                    origin: origin.into(),
                    line,
                    expected: RANKS,
                    found: rank + 1,
                });
            }
            let (token, found) =
                parse_line(text).map_err(|expected| TextError::VocabularyLine {
                    origin: origin.into(),
                    line,
                    expected,
                    found: shortened(text),
                })?;
            if found != rank {
                return Err(TextError::RankOutOfOrder {
                    origin: origin.into(),
                    line,
                    expected: rank,
                    found,
                });
            }
            if let Some(first) = ranks.ids.insert(letters(&token, &alphabet), rank) {
                return Err(TextError::DuplicateToken {
                    origin: origin.into(),
                    line,
                    token: shortened(&token),
                    first,
                });
            }
            ranks.tokens.push(token);
            ranks.lines.push(line);
        }
        // A token of a special one's spelling would take its id.
        for special in special_tokens() {
            if let Some(&rank) = ranks.ids.get(&special) {
                return Err(TextError::VocabularyLine {
                    origin: origin.into(),
                    line: ranks.lines[rank as usize],
                    expected: "an ordinary token",
                    found: special,
                });
            }
        }
        Ok(ranks)
    }

    /// The merge that makes each token of more than one byte, in the order of the ranks.
    fn merges(&self, origin: &str) -> Result<Merges, TextError> {
        let alphabet = alphabet();
        let mut bytes = [0; 256];
        for byte in 0..=u8::MAX {
            let rank = self.ids.get(&letters(&[byte], &alphabet));
            bytes[usize::from(byte)] = *rank.ok_or_else(|| TextError::MissingByte {
                origin: origin.into(),
                byte,
            })?;
        }
        let mut merges = Merges::new();
        // Ranks by the pair that makes them. (The value is a pair for the library's sake.)
        let mut known = MergeMap::default();
        for (rank, token) in (0..).zip(&self.tokens) {
            if token.len() == 1 {
                continue;
            }
            let parts = parts(token, &bytes, &known);
            let [left, right] = parts[..] else {
                return Err(TextError::UnmergeableToken {
                    origin: origin.into(),
                    line: self.lines[rank as usize],
                    token: shortened(token),
                    parts: parts.len(),
                });
            };
            known.insert((left, right), (rank, rank));
            let spelled = |id: u32| letters(&self.tokens[id as usize], &alphabet);
            merges.push((spelled(left), spelled(right)));
        }
        Ok(merges)
    }
}

/// A token of two bytes or more, encoded with the merges that are known: those of lower ranks.
fn parts(token: &[u8], bytes: &[u32; 256], known: &MergeMap) -> Vec<u32> {
    const NONE: u32 = u32::MAX;
    let mut ids: Vec<u32> = token.iter().map(|&b| bytes[usize::from(b)]).collect();
    let rank = |left, right| known.get(&(left, right)).map_or(NONE, |&(rank, _)| rank);
    // `joined[i]`: the rank of `ids[i]` and `ids[i + 1]` together.
    let mut joined: Vec<u32> = ids.windows(2).map(|pair| rank(pair[0], pair[1])).collect();
    // Two parts never join here: their token would be this one, with a lower rank.
    while ids.len() > 2 {
        let Some((i, &lowest)) = (joined.iter().enumerate())
            .min_by_key(|&(_, rank)| rank)
            .filter(|&(_, &rank)| rank != NONE)
        else {
            break;
        };
        ids[i] = lowest;
        ids.remove(i + 1);
        joined.remove(i);
        if i < joined.len() {
            joined[i] = rank(ids[i], ids[i + 1]);
        }
        if i > 0 {
            joined[i - 1] = rank(ids[i - 1], ids[i]);
        }
    }
    ids
}

/// A token and its rank, or what was expected.
fn parse_line(line: &[u8]) -> Result<(Vec<u8>, u32), &'static str> {
    let space = line.iter().position(|&byte| byte == b' ');
    let (token, rank) = line.split_at(space.ok_or("a token in base64, a space and its rank")?);
    if !(1..=MAX_BASE64_BYTES).contains(&token.len()) {
        return Err("a token of 1 to 128 bytes in base64");
    }
    let token = BASE64
        .decode(token)
        .map_err(|_| "base64 before the space")?;
    if !(1..=MAX_TOKEN_BYTES).contains(&token.len()) {
        return Err("a token of 1 to 128 bytes in base64");
    }
    let rank = &rank[1..];
    if rank.is_empty() || !rank.iter().all(u8::is_ascii_digit) {
        return Err("a rank of digits after the space");
    }
    let rank = rank.iter().try_fold(0u32, |rank, digit| {
        rank.checked_mul(10)?.checked_add(u32::from(digit - b'0'))
    });
    Ok((token, rank.ok_or("a rank below 2^32")?))
}

/// The letters that stand for the bytes in the vocabulary of a byte-level tokenizer, GPT-2's: what
/// is printable in Latin-1 stands for itself, the rest for U+0100 onwards.
pub(super) fn alphabet() -> [char; 256] {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = '\u{100}'..;
    array::from_fn(|i| {
        let byte = i as u8;
        if printable(byte) {
            char::from(byte)
        } else {
            others.next().expect("at most 256 of the letters there are")
        }
    })
}

fn letters(token: &[u8], alphabet: &[char; 256]) -> String {
    token.iter().map(|&b| alphabet[usize::from(b)]).collect()
}

/// What is shown of a line or token.
fn shortened(bytes: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
    if bytes.len() > 60 {
        shown + " ..."
    } else {
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::fs;

    /// The 256 bytes in order, then `more`.
    fn tokens(more: &[&[u8]]) -> Vec<Vec<u8>> {
        let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        bytes
            .chain(more.iter().map(|token| token.to_vec()))
            .collect()
    }

    fn file<T: AsRef<[u8]>>(tokens: &[T]) -> String {
        (tokens.iter().enumerate())
            .map(|(rank, token)| format!("{} {rank}\n", BASE64.encode(token)))
            .collect()
    }

    fn merges(more: &[&[u8]]) -> Result<Merges, TextError> {
        let file = file(&tokens(more));
        Ranks::parse(file.as_bytes(), "here")?.merges("here")
    }

    #[test]
    fn merges_are_found() {
        let found = merges(&[
            b"he",
            b"th",
            b"the",
            b" t",
            b" the",
            b"\xe4\xbd",
            b"\xe4\xbd\xa0",
        ]);
        let pair = |left: &str, right: &str| (left.to_owned(), right.to_owned());
        assert_eq!(
            found.unwrap(),
            [
                pair("h", "e"),
                pair("t", "h"),
                // `he` has the lower rank, though `th` comes first in the token.
                pair("t", "he"),
                pair("Ġ", "t"),
                pair("Ġ", "the"),
                pair("ä", "½"),
                pair("ä½", "ł"),
            ]
        );
    }

    #[test]
    fn special_tokens_fill_the_ids_above_the_ranks() {
        let special: Vec<String> = special_tokens().collect();
        assert_eq!(special.len(), 96);
        let id = |token: &str| special.iter().position(|s| s == token).unwrap() as u32 + RANKS;
        assert_eq!(id(END_OF_TEXT), 100_257);
        assert_eq!(id("<|end|>"), 100_266);
        assert_eq!(id("<|dummy_id_86|>"), 100_351);
    }

    /// The definition: of all neighbours whose bytes together are a token, the lowest rank joins
    /// first, the leftmost of equals.
    fn by_definition(text: &[u8], ranks: &HashMap<Vec<u8>, u32>) -> Vec<u32> {
        if let Some(&rank) = ranks.get(text) {
            return vec![rank];
        }
        let mut parts: Vec<Vec<u8>> = text.iter().map(|&byte| vec![byte]).collect();
        while let Some((_, i)) = (1..parts.len())
            .filter_map(|i| Some((*ranks.get(&parts[i - 1..=i].concat())?, i)))
            .min()
        {
            let right = parts.remove(i);
            parts[i - 1].extend(right);
        }
        parts.iter().map(|part| ranks[part]).collect()
    }

    proptest! {
        #[test]
        fn merging_pairs_is_joining_bytes(
            pairs in prop::collection::vec((0..1000usize, 0..1000usize), 0..40),
            texts in prop::collection::vec("[abc]{0,40}", 20),
        ) {
            // Tokens of `a`, `b` and `c`, each put together from two earlier ones.
            let mut made = vec![b"a".to_vec(), b"b".to_vec(), b"c".to_vec()];
            let mut all = tokens(&[]);
            let mut ranks: HashMap<_, _> = all.iter().cloned().zip(0..).collect();
            for (left, right) in pairs {
                let token = [&made[left % made.len()][..], &made[right % made.len()]].concat();
                let parts = by_definition(&token, &ranks).len();
                if token.len() > MAX_TOKEN_BYTES || parts == 1 {
                    continue;
                }
                if parts > 2 {
                    let mut bad = all.clone();
                    bad.push(token);
                    let bad = file(&bad);
                    let error = Ranks::parse(bad.as_bytes(), "here").unwrap().merges("here").unwrap_err();
                    let refused = matches!(error, TextError::UnmergeableToken { parts: p, .. } if p == parts);
                    prop_assert!(refused, "{}", error);
                    continue;
                }
                ranks.insert(token.clone(), all.len() as u32);
                all.push(token.clone());
                made.push(token);
            }
            let file = file(&all);
            let read = Ranks::parse(file.as_bytes(), "here").unwrap();
            let merges = read.merges("here").unwrap();
            let tokenizer = build(read.ids, merges).unwrap();
            for text in texts {
                let ids = tokenizer.encode_fast(&text[..], false).unwrap();
                let expected = if text.is_empty() { vec![] } else { by_definition(text.as_bytes(), &ranks) };
                prop_assert_eq!(ids.get_ids(), expected, "{:?}", text);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, line: usize, change: Vec<u8>) {
            let _ = tokenizer(&bytes, "here");
            let mut lines: Vec<Vec<u8>> = (file(&tokens(&[b"ab"])).lines())
                .map(|line| line.as_bytes().to_vec())
                .collect();
            let count = lines.len();
            lines[line % count] = change;
            let _ = tokenizer(&lines.join(&b'\n'), "here");
        }
    }

    #[test]
    fn lines_that_are_none() {
        let before = file(&tokens(&[]));
        let long = BASE64.encode([b'a'; MAX_TOKEN_BYTES + 1]);
        for (line, named) in [
            ("YWI=", "a token in base64, a space and its rank"),
            ("YWI=\t256", "a token in base64, a space and its rank"),
            (" 256", "1 to 128 bytes"),
            (&format!("{long} 256"), "1 to 128 bytes"),
            (&format!("{} 256", "A".repeat(1 << 20)), "1 to 128 bytes"),
            ("YWI 256", "base64 before the space"),
            ("Y!I= 256", "base64 before the space"),
            ("\u{FFFD} 256", "base64 before the space"),
            ("YWI= ", "a rank of digits"),
            ("YWI= x", "a rank of digits"),
            ("YWI= -1", "a rank of digits"),
            ("YWI= 256 7", "a rank of digits"),
            ("YWI= 4294967296", "a rank below 2^32"),
        ] {
            let file = format!("{before}\n{line}\n");
            let error = tokenizer(file.as_bytes(), "here").unwrap_err();
            assert!(
                matches!(&error, TextError::VocabularyLine { line: 258, expected, found, .. }
                    if expected.contains(named) && found.len() < 80),
                "{line:?}: {error}"
            );
            assert!(error.to_string().starts_with("here, line 258: "), "{error}");
        }
        let special = format!("{before}{} 256", BASE64.encode("<|end|>"));
        let error = tokenizer(special.as_bytes(), "here").unwrap_err();
        assert!(
            matches!(&error, TextError::VocabularyLine { line: 257, found, .. } if found == "<|end|>"),
            "{error}"
        );
    }

    #[test]
    fn ranks_out_of_place() {
        let before = file(&tokens(&[]));
        for wrong in [0, 255, 257, 100_256, u32::MAX] {
            let error = tokenizer(format!("{before}YWI= {wrong}").as_bytes(), "here").unwrap_err();
            assert!(
                matches!(error, TextError::RankOutOfOrder { line: 257, expected: 256, found, .. }
                    if found == wrong),
                "{error}"
            );
        }
        let error = tokenizer(format!("{before}QQ== 256").as_bytes(), "here").unwrap_err();
        assert!(
            matches!(&error, TextError::DuplicateToken { line: 257, token, first: 65, .. } if token == "A"),
            "{error}"
        );
    }

    #[test]
    fn vocabularies_that_are_not_whole() {
        for empty in ["", "\n\r\n"] {
            let error = tokenizer(empty.as_bytes(), "here").unwrap_err();
            assert!(
                matches!(error, TextError::VocabularySize { found: 0, .. }),
                "{error}"
            );
        }
        // As a download that broke off at the end of a line.
        let error = tokenizer(file(&tokens(&[])).as_bytes(), "here").unwrap_err();
        assert!(
            matches!(
                error,
                TextError::VocabularySize {
                    line: 256,
                    expected: RANKS,
                    found: 256,
                    ..
                }
            ),
            "{error}"
        );
        let many: Vec<[u8; 4]> = (0..=RANKS).map(u32::to_be_bytes).collect();
        let error = tokenizer(file(&many).as_bytes(), "here").unwrap_err();
        assert!(
            matches!(
                error,
                TextError::VocabularySize {
                    line: 100_257,
                    found: 100_257,
                    ..
                }
            ),
            "{error}"
        );
        let error = tokenizer(file(&many[1..]).as_bytes(), "here").unwrap_err();
        assert!(
            matches!(error, TextError::MissingByte { byte: 0, .. }),
            "{error}"
        );
        let error = merges(&[b"ab", b"wxyz"]).unwrap_err();
        assert!(
            matches!(&error, TextError::UnmergeableToken { line: 258, token, parts: 4, .. } if token == "wxyz"),
            "{error}"
        );
    }

    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path()).unwrap().is_none());
        assert!(open(&dir.path().join("none")).unwrap().is_none());
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        assert!(open(dir.path()).unwrap().is_none());
        fs::write(dir.path().join("b.tiktoken"), "x").unwrap();
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("b.tiktoken, line 1"), "{error}");
        fs::write(dir.path().join("a.tiktoken"), "x").unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(
            matches!(&error, TextError::SeveralVocabularies { found, .. }
                if *found == ["a.tiktoken", "b.tiktoken"]),
            "{error}"
        );
        fs::remove_file(dir.path().join("a.tiktoken")).unwrap();
        let large = fs::File::create(dir.path().join("b.tiktoken")).unwrap();
        large.set_len(files::MAX_TIKTOKEN_BYTES + 1).unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(matches!(error, TextError::FileTooLarge { .. }), "{error}");
    }
}
