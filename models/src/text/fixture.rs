//! The published tokenizer of the fixtures, for the unit tests of this module.

use std::sync::LazyLock;

use serde_json::Value;

use super::Tokenizer;

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizer");

fn read(name: &str) -> Vec<u8> {
    std::fs::read(format!("{DIR}/{name}")).unwrap()
}

/// The bytes of the published `tokenizer.json`.
pub fn tokenizer_json() -> Vec<u8> {
    read("tokenizer.json")
}

/// `tokenizer.json` after a change.
pub fn edited_tokenizer_json(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json = serde_json::from_slice(&tokenizer_json()).unwrap();
    edit(&mut json);
    serde_json::to_vec(&json).unwrap()
}

/// The tokenizer of Phi-3-vision: `rstrip` on `<|assistant|>` and few others, BOS by default.
pub fn vision() -> Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let config = read("tokenizer_config.json");
        Tokenizer::from_bytes(&tokenizer_json(), Some(&config), "vision").unwrap()
    });
    TOKENIZER.clone()
}

/// The text models' variant: `rstrip` on every role token, no BOS by default.
pub fn mini() -> Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let added: Value = serde_json::from_slice(&read("mini_variant_added_tokens.json")).unwrap();
        let json =
            edited_tokenizer_json(|json| json["added_tokens"] = added["added_tokens"].clone());
        let config =
            br#"{"add_bos_token": false, "bos_token": "<s>", "eos_token": "<|endoftext|>"}"#;
        Tokenizer::from_bytes(&json, Some(config), "mini").unwrap()
    });
    TOKENIZER.clone()
}
