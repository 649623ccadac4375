//! The tokenizer and the chat templates against what the reference implementations answer.
//!
//! Runs on `tests/fixtures/tokenizer`, and on `$PHIDIAS_FIXTURES/tokenizer` when that is set.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use phidias_models::text::{
    Bos, Builtin, ChatTemplate, Conversation, Detokenizer, GenerationPrompt, Message, Role,
    Special, Tokenizer,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Every folder of tokenizer fixtures there is.
fn folders() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer");
    assert!(
        own.join("tokenizer.json").exists(),
        "{} is missing",
        own.display()
    );
    let others = std::env::var_os("PHIDIAS_FIXTURES").map(|dir| Path::new(&dir).join("tokenizer"));
    [Some(own), others.filter(|folder| folder.exists())]
        .into_iter()
        .flatten()
        .collect()
}

fn read<T: DeserializeOwned>(folder: &Path, name: &str) -> T {
    let path = folder.join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The two published sets of added-token flags.
struct Variants {
    vision: Tokenizer,
    mini: Tokenizer,
}

impl Variants {
    fn open(folder: &Path) -> Self {
        let vision = Tokenizer::open(folder).unwrap().expect("a tokenizer.json");
        let mut json: Value = read(folder, "tokenizer.json");
        let added: Value = read(folder, "mini_variant_added_tokens.json");
        json["added_tokens"] = added["added_tokens"].clone();
        let json = serde_json::to_vec(&json).unwrap();
        Self {
            vision,
            mini: Tokenizer::from_bytes(&json, None, "mini").unwrap(),
        }
    }

    fn named(&self, name: &str) -> &Tokenizer {
        match name {
            "vision" => &self.vision,
            "mini" => &self.mini,
            other => panic!("no tokenizer variant {other:?}"),
        }
    }
}

#[derive(Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    both: Option<Expected>,
    vision: Option<Expected>,
    mini: Option<Expected>,
}

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    decode_keep_special: String,
    decode_skip_special: String,
}

/// Calls `check` with every case, for each variant.
fn each_case(folder: &Path, mut check: impl FnMut(&Tokenizer, &str, &Expected)) {
    let variants = Variants::open(folder);
    let Cases { cases } = read(folder, "cases.json");
    assert!(!cases.is_empty());
    for case in &cases {
        for (tokenizer, own) in [
            (&variants.vision, &case.vision),
            (&variants.mini, &case.mini),
        ] {
            let expected = own
                .as_ref()
                .or(case.both.as_ref())
                .expect("ids for both variants");
            check(tokenizer, &case.text, expected);
        }
    }
}

#[test]
fn texts_encode_and_decode_as_in_the_reference() {
    for folder in folders() {
        each_case(&folder, |tokenizer, text, expected| {
            let ids = tokenizer.encode(text, Bos::Omit).unwrap();
            assert_eq!(ids, expected.ids, "{text:?}");
            let decode = |special| tokenizer.decode(&ids, special).unwrap();
            assert_eq!(
                decode(Special::Keep),
                expected.decode_keep_special,
                "{text:?}"
            );
            assert_eq!(
                decode(Special::Skip),
                expected.decode_skip_special,
                "{text:?}"
            );

            let bos = tokenizer.bos_id().expect("a BOS token");
            let with_bos = tokenizer.encode(text, Bos::Add).unwrap();
            let rest = if ids.first() == Some(&bos) {
                &ids[1..]
            } else {
                &ids[..]
            };
            assert_eq!(with_bos, [&[bos], rest].concat(), "{text:?}");
        });
    }
}

#[test]
fn published_pairs_agree() {
    #[derive(Deserialize)]
    struct Pairs {
        pairs: Vec<Pair>,
    }
    #[derive(Deserialize)]
    struct Pair {
        text: String,
        ids: Vec<u32>,
    }
    for folder in folders() {
        let variants = Variants::open(&folder);
        let Pairs { pairs } = read(&folder, "llama_cpp_pairs.json");
        assert!(!pairs.is_empty());
        for Pair { text, ids } in &pairs {
            for tokenizer in [&variants.vision, &variants.mini] {
                assert_eq!(&tokenizer.encode(text, Bos::Omit).unwrap(), ids, "{text:?}");
            }
        }
    }
}

/// Token by token gives what decoding at once gives, wherever prompt and answer are divided.
#[test]
fn streamed_text_is_the_decoded_text() {
    let stream = |mut detokenizer: Detokenizer, ids: &[u32]| {
        let mut streamed = String::new();
        for &id in ids {
            streamed += &detokenizer.push(id).unwrap();
        }
        streamed + &detokenizer.finish().unwrap()
    };
    let check = |tokenizer: &Tokenizer, text: &str, expected: &Expected| {
        let wholes = [
            (Special::Keep, &expected.decode_keep_special),
            (Special::Skip, &expected.decode_skip_special),
        ];
        for (special, whole) in wholes {
            let own = Detokenizer::new(tokenizer, special);
            assert_eq!(&stream(own, &expected.ids), whole, "{text:?}");
            for split in 0..=expected.ids.len() {
                let (prompt, generated) = expected.ids.split_at(split);
                let after = Detokenizer::after(tokenizer, prompt, special).unwrap();
                let streamed = stream(after, generated);
                // A prompt that ends inside a character is no prefix of the whole.
                let shown = tokenizer.decode(prompt, special).unwrap();
                match whole.strip_prefix(&shown) {
                    Some(rest) => assert_eq!(streamed, rest, "{text:?} divided at {split}"),
                    None => assert!(shown.ends_with('\u{FFFD}'), "{text:?} divided at {split}"),
                }
            }
        }
    };
    for folder in folders() {
        each_case(&folder, check);
    }
}

#[derive(Deserialize)]
struct Template {
    template: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    examples: Vec<Example>,
}

impl Template {
    fn compile(&self, name: &str) -> ChatTemplate {
        let (bos, eos) = (self.bos_token.clone(), self.eos_token.clone());
        ChatTemplate::new(self.template.clone(), name, bos, eos).unwrap()
    }
}

#[derive(Deserialize)]
struct Example {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Option<Vec<u32>>,
    ids_tokenizer_variant: Option<String>,
}

impl Example {
    fn render(&self, template: &ChatTemplate) -> String {
        let prompt = match self.add_generation_prompt {
            true => GenerationPrompt::Add,
            false => GenerationPrompt::Omit,
        };
        template.render(&self.messages, prompt).unwrap()
    }
}

fn templates(folder: &Path) -> BTreeMap<String, Template> {
    let templates: BTreeMap<String, Template> = read(folder, "chat_templates.json");
    assert!(!templates.is_empty());
    templates
}

#[test]
fn chat_templates_render_as_in_the_reference() {
    for folder in folders() {
        let variants = Variants::open(&folder);
        for (name, template) in &templates(&folder) {
            let compiled = template.compile(name);
            for example in &template.examples {
                let text = example.render(&compiled);
                assert_eq!(text, example.text, "{name}: {:?}", example.messages);
                if let (Some(ids), Some(variant)) = (&example.ids, &example.ids_tokenizer_variant) {
                    let found = variants.named(variant).encode(&text, Bos::Omit).unwrap();
                    assert_eq!(&found, ids, "{name}: {text:?}");
                }
            }
        }
    }
}

/// A built-in template writes what the published one of its name writes.
#[test]
fn builtin_templates_are_the_published_ones() {
    let builtins = [
        ("phi-3-mini-first", Builtin::Phi3Mini),
        ("phi-3-medium-first", Builtin::Phi3Medium),
        ("phi-3-small", Builtin::Phi3Small),
        ("phi-3-vision", Builtin::Phi3Vision),
        ("phi-3.5-mini", Builtin::Phi35Mini),
    ];
    for folder in folders() {
        let templates = templates(&folder);
        for (name, builtin) in builtins {
            let Some(template) = templates.get(name) else {
                continue;
            };
            let builtin = ChatTemplate::builtin(builtin).unwrap();
            for example in &template.examples {
                assert_eq!(example.render(&builtin), example.text, "{name}");
            }
        }
    }
}

#[test]
fn the_folder_brings_its_template() {
    for folder in folders() {
        let config: Value = read(&folder, "tokenizer_config.json");
        let Some(source) = config["chat_template"].as_str() else {
            continue;
        };
        let opened = ChatTemplate::open(&folder, Builtin::Phi3Mini).unwrap();
        assert!(opened.origin().ends_with("tokenizer_config.json"));
        let token = |field: &str| config[field].as_str().map(String::from);
        let direct = ChatTemplate::new(
            source.into(),
            "direct",
            token("bos_token"),
            token("eos_token"),
        );
        let messages = [Message::system("s"), Message::user("u")];
        let render = |template: &ChatTemplate| template.render(&messages, GenerationPrompt::Add);
        assert_eq!(render(&opened).unwrap(), render(&direct.unwrap()).unwrap());
    }
}

/// Replays every example as a conversation: what is fed turn by turn is the rendering's ids, and
/// the end of the template's turn is among the stop tokens.
#[test]
fn conversations_feed_the_ids_of_the_rendering() {
    for folder in folders() {
        let variants = Variants::open(&folder);
        for (name, template) in &templates(&folder) {
            let compiled = template.compile(name);
            for example in &template.examples {
                let Some(variant) = &example.ids_tokenizer_variant else {
                    continue;
                };
                let tokenizer = variants.named(variant);
                let end = tokenizer
                    .id_of("<|end|>")
                    .expect("<|end|> in the vocabulary");
                assert_eq!(compiled.stop_tokens(tokenizer).unwrap(), [end], "{name}");
                replay(tokenizer, &compiled, &example.messages);
            }
        }
    }
}

fn replay(tokenizer: &Tokenizer, template: &ChatTemplate, messages: &[Message]) {
    let mut talk = Conversation::new(tokenizer.clone(), template.clone());
    let (mut fed, mut said) = (Vec::new(), Vec::new());
    for message in messages {
        match message.role {
            // An empty one is none; one that the template would drop is refused.
            Role::System => match talk.system(Some(message.content.clone())) {
                Ok(()) if message.content.is_empty() => {}
                Ok(()) => said.push(message.clone()),
                Err(_) => assert!(!talk.system_supported()),
            },
            Role::User => {
                fed.extend(talk.user(&message.content).unwrap());
                said.push(message.clone());
                let rendered = template.render(&said, GenerationPrompt::Add).unwrap();
                let whole = tokenizer
                    .encode(&rendered, tokenizer.default_bos())
                    .unwrap();
                assert_eq!(fed, whole, "{}: {said:?}", template.origin());
                assert_eq!(fed, talk.ids());
            }
            Role::Assistant => {
                let turn = format!("<|assistant|>\n{}<|end|>", message.content);
                let ids = tokenizer.encode(&turn, Bos::Omit).unwrap()[1..].to_vec();
                talk.assistant(&ids).unwrap();
                assert_eq!(talk.messages().last(), Some(message));
                fed.extend(ids);
                said.push(message.clone());
            }
        }
    }
}
