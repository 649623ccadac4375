//! How much longer a tokenizer makes a text.
//!
//! A `tokenizer.json` brings its own list of replacements, for texts before they are cut into tokens (the
//! normalizer) and for tokens on their way to text (the decoder). Phi's writes `▁` for each space, three
//! bytes for one. Twelve replacements of one letter by ten make 10^12 of it. The library does what it is
//! told until memory ends, so the growth is bounded from the list, before anything is replaced.

use serde_json::Value;

/// The most times that a text of at least one byte becomes longer: from above, each step at its worst.
pub(super) fn growth(step: &Value) -> f64 {
    let field = |name: &str| step.get(name);
    let bytes = |name: &str| field(name).and_then(Value::as_str).map_or(0, str::len) as f64;
    match field("type").and_then(Value::as_str) {
        Some("Sequence") => {
            let steps = field("normalizers").or_else(|| field("decoders"));
            let steps = steps.and_then(Value::as_array).into_iter().flatten();
            steps.map(growth).product()
        }
        Some("Replace") => {
            let content = bytes("content");
            match field("pattern").and_then(|p| p.get("String")?.as_str()) {
                Some(pattern) if !pattern.is_empty() => (content / pattern.len() as f64).max(1.0),
                // What matches may be empty: then it stands before and after each character.
                _ => 1.0 + 2.0 * content,
            }
        }
        Some("Prepend") => 1.0 + bytes("prepend"),
        // As long as its table, which maps strings to strings.
        Some("Precompiled") => 1.0 + bytes("precompiled_charsmap"),
        // The longest decomposition of Unicode is of 3 bytes into 33.
        Some("NFD" | "NFKD" | "NFC" | "NFKC") => 11.0,
        Some("Strip" | "StripAccents" | "Nmt" | "Fuse" | "ByteFallback") | None => 1.0,
        // Other letter cases, spaces around characters, bytes as letters.
        Some(_) => 4.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn steps_multiply() {
        let replace = |pattern, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let string = |s: &str| json!({ "String": s });
        let space = replace(string(" "), "▁");
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let tens = vec![replace(string("a"), "aaaaaaaaaa"); 12];
        for (step, times) in [
            (json!(null), 1.0),
            (space.clone(), 3.0),
            (replace(string("▁"), " "), 1.0),
            (replace(string("ab"), "abc"), 1.5),
            (replace(string(""), "abc"), 7.0),
            (replace(json!({"Regex": "a*"}), "abc"), 7.0),
            (prepend.clone(), 4.0),
            (json!({"type": "NFKC"}), 11.0),
            (json!({"type": "Lowercase"}), 4.0),
            (
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
                5.0,
            ),
            (
                json!({"type": "Sequence", "normalizers": [prepend, space]}),
                12.0,
            ),
            (json!({"type": "Sequence", "normalizers": tens}), 1e12),
            (json!({"type": "Sequence", "decoders": tens}), 1e12),
            (
                json!({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": tens}]}),
                1e12,
            ),
        ] {
            assert_eq!(growth(&step), times, "{step}");
        }
    }
}
