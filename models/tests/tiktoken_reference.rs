//! The tokenizer of Phi-3-small against `tiktoken-rs`, which brings the real vocabulary.
//!
//! The `.tiktoken` file is written from it into a temporary folder: nothing of it is kept here.
//! (It cuts texts into words by a newer form of the regular expression than the models were
//! trained with; `no_token_goes_on_after_a_line_end` is why the ids are the same.)

use std::path::Path;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use phidias_models::Text;
use phidias_models::text::{
    Bos, Builtin, Conversation, Detokenizer, GenerationPrompt, Message, Special, TextError,
    Tokenizer,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiktoken_rs::CoreBPE;

const RANKS: u32 = 100_256;
const END_OF_TEXT: u32 = 100_257;
const END: u32 = 100_266;

static REFERENCE: LazyLock<CoreBPE> = LazyLock::new(|| tiktoken_rs::cl100k_base().unwrap());
static OURS: LazyLock<Tokenizer> = LazyLock::new(|| open(folder().path()));

fn bytes_of(rank: u32) -> Vec<u8> {
    REFERENCE.decode_bytes(&[rank]).unwrap()
}

fn vocabulary() -> String {
    (0..RANKS)
        .map(|rank| format!("{} {rank}\n", BASE64.encode(bytes_of(rank))))
        .collect()
}

/// A folder with the vocabulary and nothing else.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("cl100k_base.tiktoken"), vocabulary()).unwrap();
    dir
}

fn open(dir: &Path) -> Tokenizer {
    Tokenizer::open(dir).unwrap().expect("a .tiktoken file")
}

fn agrees(text: &str) {
    let ids = OURS.encode(text, Bos::Omit).unwrap();
    assert_eq!(ids, REFERENCE.encode_with_special_tokens(text), "{text:?}");
    assert_eq!(OURS.decode(&ids, Special::Keep).unwrap(), text);
    let mut detokenizer = Detokenizer::new(&OURS, Special::Keep);
    let mut streamed: String = ids
        .iter()
        .map(|&id| detokenizer.push(id).unwrap())
        .collect();
    streamed += &detokenizer.finish().unwrap();
    assert_eq!(streamed, text);
}

#[test]
fn difficult_texts() {
    for text in [
        "",
        "a",
        " ",
        "Hello, world!",
        "don't DON'T we'll WE'LL I'VE they'Re it'S 'sad 'd'd l'ſ 'ſ ''s",
        "fn main() {\n    let x: Vec<u8> = vec![0xff; 1 << 20];\n\t\treturn x?;\r\n}\r\n\r\n",
        "def f(x):\n    return x ** 2  # square\n\n\n\nif __name__ == '__main__':\n",
        "0 12 345 6789 12345678901234567890 3.14159 1,000,000 ٣٤٥٦ ⅷ½²",
        "你好，世界！今日は良い天気ですね。안녕하세요 สวัสดีครับ",
        "naïve café Šimon Ελληνικά кириллица עברית العربية हिन्दी",
        "🙂👩‍👩‍👧‍👦🇨🇭🏳️‍🌈𝔾 e\u{301} \u{200B}\u{FEFF}\u{A0}\u{2003}x\u{3000}y",
        "\u{0}\u{1}\u{7f}\u{80}\u{FFFD}\u{10FFFF}",
        "trailing  ",
        "line\n  ",
        "line \n \n\t \n  x",
        "a\r\rb\r\n c\n\r d",
        " \t \n",
        "!!!???...\n\n///***\r\n---",
        "<|im_start|>user<|im_sep|>",
        "<|endoftext|>",
        "a <|endoftext|> b<|endoftext|>\n<|fim_prefix|>x<|fim_suffix|>\n  <|fim_middle|>y<|endofprompt|>",
        "<|endoftext|",
        "<<|endoftext|>>",
    ] {
        agrees(text);
    }
}

#[test]
fn long_runs() {
    for unit in [
        " ", "\n", "\t", "\r\n", "7", "a", "ab", "-", "é", "你", "🙂", " a", " \n",
    ] {
        for count in [2, 3, 4, 5, 16, 63, 64, 65, 127, 128, 129, 1000, 4096] {
            let run = unit.repeat(count);
            agrees(&run);
            agrees(&format!("x{run}y"));
        }
    }
}

#[test]
fn texts_of_the_other_tokenizer() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer/cases.json");
    let cases: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        // Phi-3-small has special tokens that the reference here has not.
        let text = case["text"].as_str().unwrap();
        let ours = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"];
        for part in ours.iter().fold(vec![text], |parts, special| {
            parts.iter().flat_map(|part| part.split(special)).collect()
        }) {
            agrees(part);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_text(text: String) {
        agrees(&text);
    }

    /// Letters, spaces and marks that the regular expression and the merges care about.
    #[test]
    fn likely_texts(text in "([a-zA-Z]{0,8}|'[sStTdDmM]|'(ll|VE|rE)|[0-9]{1,5}|[ \t\n\r]{1,6}|[!-/]{1,4}|é|你|🙂|ſ|<\\|endoftext\\|>){0,40}") {
        agrees(&text);
    }

    /// Any ids, whole characters or not, stream as they decode.
    #[test]
    fn any_ids(ids in prop::collection::vec(prop_oneof![0..256u32, 0..100_352u32], 0..24)) {
        let whole = OURS.decode(&ids, Special::Keep).unwrap();
        let mut detokenizer = Detokenizer::new(&OURS, Special::Keep);
        let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        streamed += &detokenizer.finish().unwrap();
        prop_assert_eq!(&streamed, &whole);
        if ids.iter().all(|&id| id < RANKS) {
            let bytes = REFERENCE.decode_bytes(&ids).unwrap();
            prop_assert_eq!(whole, String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn every_token_is_itself() {
    for rank in 0..RANKS {
        if let Ok(text) = String::from_utf8(bytes_of(rank)) {
            // A few tokens span what is cut into two words; nobody ever sees them whole.
            let reference = REFERENCE.encode_ordinary(&text);
            assert_eq!(
                OURS.encode(&text, Bos::Omit).unwrap(),
                reference,
                "{text:?}"
            );
            assert_eq!(OURS.decode(&[rank], Special::Keep).unwrap(), text);
        }
    }
}

/// White space at the end of a text is one word in newer forms of the regular expression, and is
/// cut after its last line end in the older one. Either way the same tokens come out, as none
/// reaches from a line end into the white space after it.
#[test]
fn no_token_goes_on_after_a_line_end() {
    for rank in 0..RANKS {
        let token = bytes_of(rank);
        let text = String::from_utf8_lossy(&token);
        if text.contains(['\n', '\r']) && text.chars().all(char::is_whitespace) {
            assert!(text.ends_with(['\n', '\r']), "{text:?}");
        }
    }
}

#[test]
fn ids_of_phi_3_small() {
    assert_eq!((OURS.vocab_size(), OURS.max_id()), (100_352, 100_351));
    OURS.check_rows(100_352).unwrap();
    OURS.check_rows(100_351).unwrap_err();
    for (token, id) in [
        ("<|dummy_id_2|>", 100_256),
        ("<|endoftext|>", END_OF_TEXT),
        ("<|fim_prefix|>", 100_258),
        ("<|fim_suffix|>", 100_260),
        ("<|system|>", 100_261),
        ("<|user|>", 100_262),
        ("<|assistant|>", 100_263),
        ("<|dummy_id_0|>", 100_264),
        ("<|dummy_id_1|>", 100_265),
        ("<|end|>", END),
        ("<|dummy_id_3|>", 100_267),
        ("<|dummy_id_11|>", 100_275),
        ("<|endofprompt|>", 100_276),
        ("<|dummy_id_12|>", 100_277),
        ("<|dummy_id_86|>", 100_351),
    ] {
        assert_eq!(OURS.id_of(token), Some(id), "{token}");
        assert_eq!(
            OURS.encode(&format!(" {token}!"), Bos::Omit).unwrap(),
            [220, id, 0]
        );
        assert!(OURS.is_special(id));
        assert_eq!(
            OURS.decode(&[0, id, 0], Special::Keep).unwrap(),
            format!("!{token}!")
        );
        assert_eq!(OURS.decode(&[0, id, 0], Special::Skip).unwrap(), "!!");
    }
    assert!(!OURS.is_special(RANKS - 1));
    assert_eq!(
        (OURS.bos_id(), OURS.eos_id()),
        (Some(END_OF_TEXT), Some(END_OF_TEXT))
    );
    assert_eq!(OURS.default_bos(), Bos::Omit);
    assert_eq!(OURS.encode("!", Bos::Add).unwrap(), [END_OF_TEXT, 0]);
}

#[test]
fn chats() {
    let dir = folder();
    let text = Text::open(dir.path()).unwrap().unwrap();
    assert_eq!(Builtin::fitting(&text.tokenizer), Builtin::Phi3Small);
    let newline = 198;
    let messages = [Message::system("Be kind."), Message::user("Hi")];
    let prompt = text
        .template
        .render(&messages, GenerationPrompt::Add)
        .unwrap();
    let plain = |text: &str| REFERENCE.encode_ordinary(text);
    let expected = [
        vec![END_OF_TEXT, 100_261, newline],
        plain("Be kind."),
        vec![END, newline, 100_262, newline],
        plain("Hi"),
        vec![END, newline, 100_263, newline],
    ]
    .concat();
    assert_eq!(OURS.encode(&prompt, OURS.default_bos()).unwrap(), expected);
    assert_eq!(text.template.stop_tokens(&text.tokenizer).unwrap(), [END]);

    let mut talk = Conversation::new(text.tokenizer, text.template);
    talk.system(Some("Be kind.".into())).unwrap();
    assert_eq!(talk.user("Hi").unwrap(), expected);
    talk.assistant(&[plain("Hello!"), vec![END]].concat())
        .unwrap();
    let turn = [
        vec![newline, 100_262, newline],
        plain("Bye"),
        vec![END, newline, 100_263, newline],
    ];
    assert_eq!(talk.user("Bye").unwrap(), turn.concat());
}

#[test]
fn the_config_and_tokenizer_json_come_first() {
    let dir = folder();
    let write = |name: &str, value: &Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    write(
        "tokenizer_config.json",
        &json!({"add_bos_token": true, "eos_token": "<|end|>",
                "chat_template": "{{ messages[0].content }}{{ eos_token }}"}),
    );
    let text = Text::open(dir.path()).unwrap().unwrap();
    let tokenizer = &text.tokenizer;
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id()),
        (Some(END_OF_TEXT), Some(END))
    );
    assert_eq!(tokenizer.default_bos(), Bos::Add);
    let prompt = text
        .template
        .render(&[Message::user("Hi")], GenerationPrompt::Add);
    assert_eq!(prompt.unwrap(), "Hi<|end|>");
    write("tokenizer_config.json", &json!({"bos_token": "<s>"}));
    let error = Tokenizer::open(dir.path()).unwrap_err();
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

    write("tokenizer_config.json", &json!({}));
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer");
    std::fs::copy(
        other.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    assert_eq!(open(dir.path()).id_of("<|end|>"), Some(32_007));
}

/// Beyond the limit the library would leave the rest of a text uncut, and say nothing.
#[test]
fn white_space_without_end_is_refused() {
    let error = OURS
        .encode(&format!("x{}y", " ".repeat(500_001)), Bos::Omit)
        .unwrap_err();
    assert!(
        matches!(
            error,
            TextError::SpaceTooLong {
                chars: 500_001,
                limit: 500_000
            }
        ),
        "{error}"
    );
    // Wide spaces are not longer; and line ends do not make the rest a run of its own.
    for space in [" ", "\u{3000}", " \n"] {
        let text = format!("x{}y12345", space.repeat(500_000 / space.chars().count()));
        let ids = OURS.encode(&text, Bos::Omit).unwrap();
        assert_eq!(ids[ids.len() - 2..], REFERENCE.encode_ordinary("12345"));
        assert_eq!(OURS.decode(&ids, Special::Keep).unwrap(), text);
    }
}
