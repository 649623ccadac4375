//! Tokenizers of the family's forms, made up by rule. The real vocabularies were learnt from text.
//!
//! **Llama's form**: byte-pair encoding with byte fallback and `▁` for the space, 32 000 ids,
//! Phi-3's added tokens above.
//!
//! | ids | pieces |
//! |---|---|
//! | 0 to 2 | `<unk>`, `<s>`, `</s>` |
//! | 3 to 258 | the 256 bytes, for characters without a piece (`\n` among them) |
//! | then | `▁`, printable ASCII, accented Latin letters |
//! | then | runs of `▁`; `▁` and a letter; every two lower-case letters, and those after a `▁` |
//! | to 31 999 | every three lower-case letters, and those after a `▁` as far as the ids go |
//!
//! so English costs a token for two letters and a bit. A piece may be merged from any two pieces
//! that make it up, earlier pieces first, as `tokenizer.json` files converted from sentencepiece
//! have it. As with Phi-3.5-mini, `<s>` is not put before a text. The same pieces are written as a
//! sentencepiece model, `tokenizer.model`: converters to GGUF read the pieces, their scores and kinds
//! from there.
//!
//! **Phi-3-small's form**: byte-level, 100 256 ranks in a `.tiktoken` file; its special tokens are
//! not in any file.
//!
//! | ids | tokens |
//! |---|---|
//! | 0 to 255 | the bytes |
//! | then | accented Latin letters; runs of spaces; a space and a letter |
//! | then | every two lower-case letters, those after a space, every three, those after a space |
//! | to 100 255 | every four lower-case letters as far as the ids go |
//!
//! Whatever merges inside such a token first, two tokens are left at last: they are all there.

use crate::text::{Builtin, tiktoken};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// The form of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Llama's, which all but Phi-3-small have.
    Llama,
    /// Phi-3-small's.
    Cl100k,
}

impl Form {
    /// The form for an embedding matrix of so many rows: the larger one where it has room.
    pub(super) fn of(vocab_size: usize) -> Self {
        if vocab_size >= tiktoken::RANKS as usize + tiktoken::special_tokens().count() {
            Self::Cl100k
        } else {
            Self::Llama
        }
    }
}

/// Ids below the added tokens.
const SIZE: usize = 32_000;
const BYTES: usize = 256;
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
const END_OF_TEXT: &str = "<|endoftext|>";
/// Ids from [`SIZE`] on, in order.
const ADDED: [&str; 11] = [
    END_OF_TEXT,
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
];
/// Lower-case letters, the frequent ones of English first.
const LETTERS: &str = "etaoinshrdlucmfwypvbgkjqxz";

/// Every tokenizer file: name and bytes.
pub(super) fn files(form: Form, max_length: usize) -> Vec<(&'static str, Vec<u8>)> {
    match form {
        Form::Llama => {
            let pieces = pieces();
            vec![
                ("tokenizer.json", super::pretty(&tokenizer(&pieces))),
                (
                    "tokenizer_config.json",
                    super::pretty(&tokenizer_config(max_length)),
                ),
                ("special_tokens_map.json", super::pretty(&named_tokens())),
                ("tokenizer.model", sentencepiece_model(&pieces)),
            ]
        }
        Form::Cl100k => vec![
            ("cl100k_base.tiktoken", ranks()),
            (
                "tokenizer_config.json",
                super::pretty(&cl100k_config(max_length)),
            ),
        ],
    }
}

fn letters() -> impl Iterator<Item = char> + Clone {
    LETTERS.chars()
}

/// Every string of one letter more than those of `shorter`.
fn longer(shorter: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    shorter.flat_map(|start| letters().map(move |letter| format!("{start}{letter}")))
}

fn two() -> impl Iterator<Item = String> {
    longer(letters().map(String::from))
}

fn three() -> impl Iterator<Item = String> {
    longer(two())
}

/// The pieces of the ids below [`SIZE`], in their order.
fn pieces() -> Vec<String> {
    let word = |start: String| format!("▁{start}");
    SPECIAL
        .iter()
        .map(|s| (*s).to_owned())
        .chain((0..BYTES).map(|byte| format!("<0x{byte:02X}>")))
        .chain(["▁".to_owned()])
        .chain(('!'..='~').chain('¡'..='ſ').map(String::from))
        .chain([2, 4, 8, 16].map(|spaces| "▁".repeat(spaces)))
        .chain(letters().chain('A'..='Z').map(String::from).map(word))
        .chain(two())
        .chain(two().map(word))
        .chain(three())
        .chain(three().map(word))
        .take(SIZE)
        .collect()
}

/// The `.tiktoken` file: `base64 rank`, one a line.
fn ranks() -> Vec<u8> {
    let word = |start: String| format!(" {start}");
    let merged = (('¡'..='ſ').map(String::from))
        .chain([2, 4, 8, 16].map(|spaces| " ".repeat(spaces)))
        .chain(letters().chain('A'..='Z').map(String::from).map(word))
        .chain(two())
        .chain(two().map(word))
        .chain(three())
        .chain(three().map(word))
        .chain(longer(three()));
    let tokens = (0..=u8::MAX)
        .map(|byte| vec![byte])
        .chain(merged.map(String::into_bytes));
    (tokens.zip(0..tiktoken::RANKS))
        .flat_map(|(token, rank)| format!("{} {rank}\n", BASE64.encode(token)).into_bytes())
        .collect()
}

/// The pairs that merge, in the order of the piece they make.
fn merges(pieces: &[String]) -> Vec<String> {
    let ordinary = &pieces[SPECIAL.len() + BYTES..];
    let known: HashSet<&str> = ordinary.iter().map(String::as_str).collect();
    let mut merges = Vec::new();
    for piece in ordinary {
        for (i, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(i);
            if known.contains(left) && known.contains(right) {
                merges.push(format!("{left} {right}"));
            }
        }
    }
    merges
}

/// The tokens outside the merges: id, spelling, and the flags of the published Phi-3-mini.
fn added_tokens() -> impl Iterator<Item = (usize, Value)> {
    let ids = (0..SPECIAL.len()).chain(SIZE..);
    ids.zip(SPECIAL.into_iter().chain(ADDED))
        .map(|(id, content)| {
            let swallows_space = !["<unk>", "<s>", END_OF_TEXT].contains(&content);
            let token = json!({
                "content": content,
                "lstrip": false,
                "normalized": false,
                "rstrip": swallows_space,
                "single_word": false,
                "special": content != "</s>",
            });
            (id, token)
        })
}

fn tokenizer(pieces: &[String]) -> Value {
    let added: Vec<Value> = added_tokens()
        .map(|(id, mut token)| {
            token["id"] = id.into();
            token
        })
        .collect();
    let vocab: Map<String, Value> = (pieces.iter().enumerate())
        .map(|(id, piece)| (piece.clone(), id.into()))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "vocab": vocab,
            "merges": merges(pieces),
        },
    })
}

fn named_tokens() -> Value {
    json!({
        "bos_token": "<s>",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": "<unk>",
    })
}

fn tokenizer_config(max_length: usize) -> Value {
    let mut config = json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": added_tokens()
            .map(|(id, token)| (id.to_string(), token))
            .collect::<Map<_, _>>(),
        "chat_template": Builtin::Phi35Mini.source(),
        "clean_up_tokenization_spaces": false,
        "legacy": false,
        "model_max_length": max_length,
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": false,
    });
    if let (Value::Object(config), Value::Object(tokens)) = (&mut config, named_tokens()) {
        config.extend(tokens);
    }
    config
}

fn cl100k_config(max_length: usize) -> Value {
    json!({
        "added_tokens_decoder": {},
        "bos_token": tiktoken::END_OF_TEXT,
        "chat_template": Builtin::Phi3Small.source(),
        "eos_token": tiktoken::END_OF_TEXT,
        "model_max_length": max_length,
        "pad_token": tiktoken::END_OF_TEXT,
        "tokenizer_class": "Phi3SmallTokenizer",
    })
}

/// The pieces as a sentencepiece model: a protocol buffer of the message `ModelProto`
/// (<https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto>).
fn sentencepiece_model(pieces: &[String]) -> Vec<u8> {
    let mut model = Message::default();
    for (id, piece) in pieces.iter().enumerate() {
        // Of the pieces that could be merged next, the one with the highest score is.
        let (score, kind) = match id {
            0 => (0.0, 2),                                    // UNKNOWN
            1 | 2 => (0.0, 3),                                // CONTROL
            _ if id < SPECIAL.len() + BYTES => (0.0, 6),      // BYTE
            _ => (-((id - SPECIAL.len() - BYTES) as f32), 1), // NORMAL
        };
        let mut entry = Message::default();
        entry.bytes(1, piece.as_bytes());
        entry.float(2, score);
        entry.integer(3, kind);
        model.bytes(1, &entry.0);
    }
    let mut trainer = Message::default();
    trainer.integer(3, 2); // model_type BPE
    trainer.integer(4, pieces.len() as u64); // vocab_size
    trainer.integer(35, 1); // byte_fallback
    trainer.integer(40, 0); // unk_id
    trainer.integer(41, 1); // bos_id
    trainer.integer(42, 2); // eos_id
    trainer.integer(43, u64::MAX); // pad_id: -1, none
    model.bytes(2, &trainer.0);
    let mut normalizer = Message::default();
    normalizer.bytes(1, b"identity"); // name
    normalizer.integer(3, 1); // add_dummy_prefix
    normalizer.integer(4, 0); // remove_extra_whitespaces
    normalizer.integer(5, 1); // escape_whitespaces
    model.bytes(3, &normalizer.0);
    model.0
}

/// A protocol buffer message in the making.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
    fn integer(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }
    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
}
