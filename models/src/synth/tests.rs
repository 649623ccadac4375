use super::presets::SMALL_8K;
use super::vocabulary::Form;
use super::*;
use crate::model::{Model, OpenOptions, Source, Text};
use crate::quantize::quantize_folder;
use crate::session::{Session, SessionOptions};
use crate::text::{Bos, Builtin, ChatTemplate, GenerationPrompt, Message, Special, Tokenizer};
use phidias_engine::checkpoint::CheckpointError;
use std::collections::HashSet;
use std::sync::Arc;
use tempfile::TempDir;

/// Small in every dimension but the vocabulary, with grouped heads and LongRoPE.
const TINY: Preset = Preset {
    name: "tiny",
    hidden_size: 128,
    intermediate_size: 224,
    layers: 3,
    heads: 4,
    kv_heads: 2,
    ..Preset::ALL[3]
};

/// Likewise, with experts.
const TINY_MOE: Preset = Preset {
    name: "tiny-moe",
    hidden_size: 128,
    intermediate_size: 96,
    layers: 3,
    heads: 4,
    kv_heads: 2,
    ..Preset::ALL[7]
};

fn made(format: WeightFormat, change: impl FnOnce(&mut SynthOptions<'_>)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut options = SynthOptions {
        format,
        threads: Some(2),
        ..SynthOptions::default()
    };
    change(&mut options);
    synthesize(TINY, &folder.path().join("m"), options).unwrap();
    folder
}

fn weights(folder: &TempDir) -> Vec<u8> {
    fs::read(folder.path().join("m").join(SINGLE)).unwrap()
}

fn logits(model: &Arc<Model>, prompt: &[u32]) -> Vec<f32> {
    let mut session = Session::new(Arc::clone(model), &SessionOptions::default()).unwrap();
    session.extend(prompt).unwrap().to_vec()
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len())
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
        .unwrap()
}

#[test]
fn every_format_opens_as_itself_and_answers() {
    for format in WeightFormat::ALL {
        let folder = made(format, |o| o.layers = Some(1));
        let out = folder.path().join("m");
        let model = Model::open(&out, OpenOptions::default()).unwrap();
        assert_eq!(model.format(), format);
        assert_eq!(model.config().num_hidden_layers, 1);
        assert!(model.note().is_none(), "nothing was converted");
        let logits = logits(&Arc::new(model), &[1, 5, 9]);
        assert!(logits.iter().all(|v| v.is_finite()), "{format}");
    }
}

#[test]
fn bytes_depend_on_seed_and_layers_but_not_on_threads() {
    let one = weights(&made(WeightFormat::Bf16, |o| o.threads = Some(1)));
    let three = weights(&made(WeightFormat::Bf16, |o| o.threads = Some(3)));
    assert!(one == three);
    let other = weights(&made(WeightFormat::Bf16, |o| o.seed = 1));
    assert!(one.len() == other.len() && one != other);
    let q4 = |threads| weights(&made(WeightFormat::Q4, |o| o.threads = Some(threads)));
    assert!(q4(1) == q4(2));
}

/// One model, whatever it is stored in.
#[test]
fn every_format_is_the_bf16_folder_quantized() {
    let bf16 = made(WeightFormat::Bf16, |_| ());
    for format in [WeightFormat::Q4, WeightFormat::Q8] {
        let out = bf16.path().join(format.name());
        quantize_folder(
            &bf16.path().join("m"),
            &out,
            format,
            &mut OpenOptions::default(),
        )
        .unwrap();
        let direct = made(format, |_| ());
        assert!(weights(&direct) == fs::read(out.join(SINGLE)).unwrap());
    }
    let f32 = made(WeightFormat::F32, |_| ());
    let (narrow, wide) = (
        Source::open(&bf16.path().join("m")).unwrap().checkpoint,
        Source::open(&f32.path().join("m")).unwrap().checkpoint,
    );
    for (name, tensor) in narrow.tensors() {
        let mut values = vec![[0.0; 2]; tensor.shape().iter().product()];
        for (i, source) in [tensor, wide.get(name).unwrap()].into_iter().enumerate() {
            let mut column = vec![0.0; values.len()];
            assert!(source.widen(0, &mut column));
            values.iter_mut().zip(column).for_each(|(v, c)| v[i] = c);
        }
        assert!(values.iter().all(|[a, b]| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn values_have_the_mean_and_deviation_that_was_asked() {
    let spec = Spec {
        name: "model.layers.0.mlp.gate_up_proj.weight".into(),
        shape: vec![1024, 256],
        role: Role::Matrix,
    };
    let mut values = vec![0.0; 1024 * 256];
    let config = TINY.configuration(None).unwrap();
    let drawn = Drawn::new(&spec, &config, 7);
    assert!(drawn.widen(0, &mut values));
    let n = values.len() as f64;
    let moment = |p| {
        values
            .iter()
            .map(|v| f64::from(v * 16.0).powi(p))
            .sum::<f64>()
            / n
    };
    // Four standard errors of n draws: 4/sqrt(n), and 4 sqrt(1.7/n) for the variance, 1.7 being
    // the fourth moment of Irwin-Hall less one; a little more for the rounding to bf16.
    assert!(moment(1).abs() < 0.008, "{}", moment(1));
    assert!((moment(2) - 1.0).abs() < 0.012, "{}", moment(2));
    // Any range is the same as in the whole; another name, seed or place is another draw.
    let mut part = vec![0.0; 100];
    assert!(drawn.widen(777, &mut part));
    assert_eq!(part, values[777..877]);
    let same = part.iter().zip(&values).filter(|(a, b)| a == b).count();
    assert!(same < 5, "{same}");
}

#[test]
fn logits_spread_and_depend_on_the_prompt() {
    let folder = made(WeightFormat::Bf16, |_| ());
    let model = Model::open(&folder.path().join("m"), OpenOptions::default()).unwrap();
    let model = Arc::new(model);
    let mut winners = HashSet::new();
    for prompt in 0..8 {
        // The same last token, so that what differs comes through attention.
        let prompt: Vec<u32> = [1, 300 + prompt, 900 * prompt, 31_000 - prompt, 4_000].into();
        let logits = logits(&model, &prompt);
        let n = logits.len() as f64;
        let mean = logits.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = (logits.iter())
            .map(|v| (f64::from(*v) - mean).powi(2))
            .sum::<f64>()
            / n;
        let std = variance.sqrt();
        assert!((1.0..6.0).contains(&std), "{std}");
        winners.insert(argmax(&logits));
    }
    assert!(winners.len() >= 4, "{winners:?}");
}

/// Every expert gets its share of random tokens, so that a bench of a mixture measures one.
#[test]
fn a_router_spreads_tokens_over_its_experts() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    let options = SynthOptions {
        format: WeightFormat::Q4,
        threads: Some(2),
        ..SynthOptions::default()
    };
    synthesize(TINY_MOE, &out, options).unwrap();
    let model = Arc::new(Model::open(&out, OpenOptions::default()).unwrap());
    let tokens: Vec<u32> = (0..512).map(|i| i * 7919 % 32_000).collect();
    let mut session = Session::new(Arc::clone(&model), &SessionOptions::default()).unwrap();
    session.extend(&tokens).unwrap();
    let layers = session.take_routing().unwrap();
    assert_eq!(layers.len(), 3);
    for layer in layers {
        assert_eq!(layer.tokens.iter().sum::<u64>(), 1024);
        // 64 each on average.
        assert!(
            layer.tokens.iter().all(|n| (8..256).contains(n)),
            "{:?}",
            layer.tokens
        );
    }
}

/// Small in every dimension but the vocabulary: block-sparse layers of two blocks and more.
#[test]
fn phi_3_small_answers_and_never_with_an_id_that_is_no_token() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    let preset = Preset {
        hidden_size: 128,
        intermediate_size: 224,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        ..SMALL_8K
    };
    synthesize(preset, &out, SynthOptions::default()).unwrap();
    let model = Arc::new(Model::open(&out, OpenOptions::default()).unwrap());
    assert_eq!(*model.stop_tokens(), [100_257, 100_266].into());
    let prompt: Vec<u32> = (0..150).map(|i| i * 661).collect();
    let logits = logits(&model, &prompt);
    let (tokens, rest) = logits.split_at(100_256);
    let n = tokens.len() as f64;
    let variance = tokens.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
    assert!((1.0..36.0).contains(&variance), "{variance}");
    let unused: Vec<_> = (0..rest.len()).filter(|i| rest[*i] == f32::MIN).collect();
    assert_eq!(unused.len(), 1 + 3 + 2 + 85);
    assert_eq!((unused[0], unused[1], unused[90]), (0, 2, 95));
    assert!(argmax(&logits) < 100_267);
}

/// Texts come back, and English has less than a token for two bytes.
fn gives_text_back(tokenizer: &Tokenizer) {
    for text in [
        "The quick brown fox jumps over the lazy dog.",
        "Hello, world!  Two spaces, 3.14, e-mail@example.org\nand a\ttab; naïve Šimon 你好 🙂",
        " leading and trailing ",
        "",
    ] {
        let ids = tokenizer.encode(text, Bos::Omit).unwrap();
        assert_eq!(tokenizer.decode(&ids, Special::Keep).unwrap(), text);
    }
    let english = "There was once a miller who had a beautiful daughter and nothing else besides";
    let tokens = tokenizer.encode(english, Bos::Omit).unwrap().len();
    assert!(tokens * 2 < english.len(), "{tokens}");
}

#[test]
fn the_tokenizer_gives_text_back() {
    let folder = made(WeightFormat::Q4, |o| o.layers = Some(1));
    let tokenizer = Tokenizer::open(&folder.path().join("m")).unwrap().unwrap();
    gives_text_back(&tokenizer);
    let template = ChatTemplate::open(&folder.path().join("m"), Builtin::Phi3Small).unwrap();
    let prompt = template
        .render(&[Message::user("Hi")], GenerationPrompt::Add)
        .unwrap();
    let ids = tokenizer.encode(&prompt, Bos::Omit).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (32_010, 32_001));
    assert!(ids.contains(&32_007));
}

/// The fields of a protocol buffer message: number, and a length-delimited value or an integer.
fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8], u64)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let len = 1 + bytes.iter().position(|b| *b < 0x80).unwrap();
        let (number, rest) = bytes.split_at(len);
        *bytes = rest;
        (number.iter().rev()).fold(0, |value, b| value << 7 | u64::from(b & 0x7f))
    }
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (len, integer) = match key & 7 {
            0 => (0, varint(&mut bytes)),
            2 => (usize::try_from(varint(&mut bytes)).unwrap(), 0),
            5 => (4, 0),
            other => panic!("wire type {other}"),
        };
        let (value, rest) = bytes.split_at(len);
        fields.push((key >> 3, value, integer));
        bytes = rest;
    }
    fields
}

/// What converters and other engines open by name, and what they ask of it.
#[test]
fn other_engines_find_what_they_ask_for() {
    let folder = made(WeightFormat::Bf16, |o| o.layers = Some(1));
    let read = |name: &str| fs::read(folder.path().join("m").join(name)).unwrap();
    let json = |name: &str| -> serde_json::Value { serde_json::from_slice(&read(name)).unwrap() };
    let config = json("config.json");
    assert_eq!(config["architectures"][0], "Phi3ForCausalLM");
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert!(json("generation_config.json")["eos_token_id"].is_array());
    let tokens = json("tokenizer_config.json");
    assert_eq!(tokens["tokenizer_class"], "LlamaTokenizer");
    assert!(tokens["chat_template"].is_string());
    assert_eq!(json("special_tokens_map.json")["bos_token"], "<s>");

    // Added tokens are the same in both files, follow the vocabulary without a gap and have weights.
    let tokenizer = json("tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let decoder = tokens["added_tokens_decoder"].as_object().unwrap();
    assert_eq!(added.len(), decoder.len());
    let mut next = vocab.len() as u64;
    for token in added {
        let id = token["id"].as_u64().unwrap();
        assert_eq!(decoder[&id.to_string()]["content"], token["content"]);
        match vocab.get(token["content"].as_str().unwrap()) {
            Some(known) => assert_eq!(known, id),
            None => assert_eq!(id, std::mem::replace(&mut next, id + 1)),
        }
    }
    assert!(next <= config["vocab_size"].as_u64().unwrap());

    // The sentencepiece model: the same pieces in the same order, and of the right kinds.
    let model = read("tokenizer.model");
    let model = fields(&model);
    let mut scores = std::collections::HashMap::new();
    let pieces = model.iter().filter(|(field, ..)| *field == 1);
    for (id, (_, piece, _)) in pieces.clone().enumerate() {
        let [(1, text, _), (2, score, _), (3, _, kind)] = fields(piece)[..] else {
            panic!("piece {id}");
        };
        let text = std::str::from_utf8(text).unwrap();
        assert_eq!(vocab[text], id, "{text}");
        let byte = || text == format!("<0x{:02X}>", id - 3);
        match kind {
            1 => _ = scores.insert(text, f32::from_le_bytes(score.try_into().unwrap())),
            2 => assert_eq!(text, "<unk>"),
            3 => assert!(["<s>", "</s>"].contains(&text), "{text}"),
            6 => assert!(byte(), "{text}"),
            other => panic!("{text}: kind {other}"),
        }
    }
    assert_eq!(pieces.count(), vocab.len());
    assert_eq!(scores.len(), vocab.len() - 3 - 256);
    let trainer = fields(model.iter().find(|(field, ..)| *field == 2).unwrap().1);
    let trained = |field| trainer.iter().find(|f| f.0 == field).map(|f| f.2);
    assert_eq!(trained(3), Some(2), "byte-pair encoding");
    assert_eq!(trained(4), Some(vocab.len() as u64));
    assert_eq!((trained(41), trained(42)), (Some(1), Some(2)), "<s>, </s>");

    // And it cuts a text in the same way: the pair that makes the piece of the highest score merges.
    let ours = Tokenizer::open(&folder.path().join("m")).unwrap().unwrap();
    let text = "There was once a miller, who had a beautiful  daughter: Nothing else.";
    let mut cut: Vec<String> = format!("▁{}", text.replace(' ', "▁"))
        .chars()
        .map(String::from)
        .collect();
    let score = |pair: &[String]| scores.get(pair.concat().as_str()).copied();
    while let Some((at, _)) = (cut.windows(2).enumerate())
        .filter_map(|(i, pair)| Some((i, score(pair)?)))
        // The first of equals.
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
    {
        let right = cut.remove(at + 1);
        cut[at].push_str(&right);
    }
    let ids: Vec<u32> = (cut.iter())
        .map(|piece| u32::try_from(vocab[piece].as_u64().unwrap()).unwrap())
        .collect();
    assert_eq!(ours.encode(text, Bos::Omit).unwrap(), ids);
}

#[test]
fn the_tokenizer_of_phi_3_small_gives_text_back() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Form::of(32_064), Form::Llama);
    assert_eq!(Form::of(100_352), Form::Cl100k);
    for (name, bytes) in vocabulary::files(Form::Cl100k, 8192) {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let text = Text::open(folder.path()).unwrap().unwrap();
    gives_text_back(&text.tokenizer);
    assert_eq!(text.tokenizer.vocab_size(), 100_352);
    text.tokenizer.check_rows(100_352).unwrap();
    let prompt = (text.template)
        .render(&[Message::user("Hi")], GenerationPrompt::Add)
        .unwrap();
    let ids = text.tokenizer.encode(&prompt, Bos::Omit).unwrap();
    assert_eq!(ids[..2], [100_257, 100_262]);
    let stops = text.template.stop_tokens(&text.tokenizer).unwrap();
    assert_eq!(
        (stops, text.tokenizer.eos_id()),
        (vec![100_266], Some(100_257))
    );
    assert!(ids.contains(&100_266) && ids.contains(&100_263));
}

#[test]
fn presets_have_the_published_sizes() {
    // 3.8 and 14 billion parameters, as the model cards round them.
    let parameters = |name: &str| {
        let preset: Preset = name.parse().unwrap();
        let json = pretty(&preset.config(preset.layers, WeightFormat::Bf16));
        let config = Config::from_json(Path::new(name), &json).unwrap();
        let original = name.ends_with("-4k") || name.ends_with("-8k");
        assert_eq!(config.rope.long.is_some(), !original);
        if let Some(long) = &config.rope.long {
            assert_eq!(long.long_factor.len(), config.head_dim / 2);
            assert_eq!(
                long.original_max_position_embeddings,
                preset.original_positions
            );
        }
        (config.specs().iter())
            .map(|s| s.shape.iter().product::<usize>())
            .sum::<usize>()
    };
    for name in ["phi-3-mini-4k", "phi-3-mini-128k", "phi-3.5-mini"] {
        assert_eq!(parameters(name), 3_821_079_552);
    }
    for name in ["phi-3-medium-4k", "phi-3-medium-128k"] {
        assert_eq!(parameters(name), 13_960_238_080);
    }
    for name in ["phi-3-small-8k", "phi-3-small-128k"] {
        assert_eq!(parameters(name), 7_392_272_384);
    }
    // 41.9 billion, as the model card rounds them.
    assert_eq!(parameters("phi-3.5-moe"), 41_873_153_344);
    let preset: Preset = "phi-3.5-mini".parse().unwrap();
    let config = preset.config(1, WeightFormat::Bf16);
    let scaling = &config["rope_scaling"];
    assert_eq!(scaling["long_factor"][0], 1.0800000429153442);
    assert_eq!(scaling["long_factor"][47], 64.83999633789062);
    assert_eq!(scaling["short_factor"][15], 1.2899998426437378);
}

#[test]
fn refusals_name_what_was_asked() {
    let error = "phi-4".parse::<Preset>().unwrap_err().to_string();
    assert!(
        Preset::ALL.iter().all(|p| error.contains(p.name)),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    for asked in [0, 4, usize::MAX] {
        let options = SynthOptions {
            layers: Some(asked),
            ..SynthOptions::default()
        };
        let error = synthesize(TINY, &out, options).unwrap_err();
        assert!(
            matches!(error, Error::Layers { asked: a, max: 3, .. } if a == asked),
            "{error}"
        );
    }
    // Four hundred terabytes: planned, compared with the disk, refused.
    let large = Preset {
        hidden_size: 65_536,
        intermediate_size: 1 << 20,
        layers: 1000,
        ..TINY
    };
    let error = synthesize(large, &out, SynthOptions::default()).unwrap_err();
    assert!(
        matches!(&error, Error::DiskSpace { path, needed, available }
            if *path == out && *needed > 400_000_000_000_000 && available < needed),
        "{error}"
    );
    let options = SynthOptions::default();
    options.cancel.cancel();
    let error = synthesize(TINY, &out, options).unwrap_err();
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::Cancelled)
    ));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::create_dir(&out).unwrap();
    let error = synthesize(TINY, &out, SynthOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
}
