//! Models on a device: the host device, and the GPU where there is one. What the reference implementation
//! gives is compared in `reference.rs` and `vision_reference.rs`, on devices as on the CPU.
//!
//! ```text
//! near    the CPU's results, in the formats whose products are sums of integers, and in bf16
//! same    bit for bit: chunks, contexts, decoding and prompts, recorded passes, what was truncated
//! chosen  from the likeliest tokens what all logits give, and nothing else is copied
//! counted tokens by expert, as on the CPU
//! ```
#![cfg(feature = "cuda")]

mod common;

use common::{
    Random, all_logits, config, devices, moe_config, open, open_on, relative_error, session,
    small_config, text_fixtures, weights, write_model,
};
use phidias::engine::Cancel;
use phidias::engine::generate::{Detokenize, Event, Next, Outcome, Sequence, generate};
use phidias::engine::kernels::cuda::sample::candidate_values;
use phidias::engine::kernels::cuda::{Device, HostDevice, HostMemory, Memory, Order, Traffic};
use phidias::engine::kv_cache::KvType;
use phidias::engine::sampling::{MOST, SamplingParams};
use phidias::models::session::memory_plan;
use phidias::models::{Crossing, Source};
use phidias::{Error, GenerateOptions, Model, Session, SessionOptions, WeightFormat};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// The fixtures, and models that they lack: an MLP whose gate ends inside a panel, a head that is the
/// embedding table, biases everywhere.
struct Folders {
    list: Vec<PathBuf>,
    made: TempDir,
}

fn folders() -> Folders {
    let made = TempDir::new().unwrap();
    let mut list = text_fixtures();
    let odd = changed(config(), "intermediate_size", json!(40));
    let tied = changed(config(), "tie_word_embeddings", json!(true));
    let configs = [odd, tied, small_config(), moe_config()];
    for (config, seed) in configs.iter().zip(1..) {
        let folder = made.path().join(format!("made{seed}"));
        write_model(&folder, config, &weights(config, "BF16", seed));
        list.push(folder);
    }
    Folders { list, made }
}

fn changed(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

/// Every folder in some formats, on every device.
fn each_model(formats: &[WeightFormat], mut check: impl FnMut(&str, &Arc<Model>, &Path)) {
    let folders = folders();
    for device in devices() {
        for folder in &folders.list {
            for &format in formats {
                let what = format!("{} in {format} on {}", folder.display(), device.name());
                check(&what, &open_on(&device, folder, format), folder);
            }
        }
    }
}

/// Any of the fixtures on every device.
fn each_device(mut check: impl FnMut(&Arc<dyn Device>, &Path)) {
    let folder = text_fixtures().remove(0);
    devices().iter().for_each(|device| check(device, &folder));
}

/// Some folders on host devices, to whose memory nobody else helps himself, and which count it: by bytes, and
/// in pieces, as a GPU gives it out.
fn where_bytes_are_counted(list: &[PathBuf], check: impl Fn(&Arc<dyn Device>, &Path)) {
    for piece in [1, 2 << 20] {
        // Little of it: some is taken to leave the rest.
        let bytes = 256 << 20;
        let memory = HostMemory {
            bytes,
            piece,
            recorded: 1 << 10,
        };
        let Ok(host) = HostDevice::with_memory(Order::Forward, memory) else {
            return;
        };
        let host: Arc<dyn Device> = Arc::new(host);
        list.iter().for_each(|folder| check(&host, folder));
    }
}

fn run(chunk: usize, context: usize) -> SessionOptions {
    SessionOptions {
        context: Some(context),
        chunk,
        threads: Some(1),
        ..SessionOptions::default()
    }
}

fn with_cache(kind: KvType, options: SessionOptions) -> SessionOptions {
    SessionOptions {
        kv_type: Some(kind),
        ..options
    }
}

fn prompt(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    Random(seed).ids(n, model.config().vocab_size)
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| v.to_bits()).collect()
}

fn assert_same(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(bits(got) == bits(want), "{what}: logits {i} differ");
    }
}

fn worst(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    assert_eq!(got.len(), want.len());
    let errors = got.iter().zip(want).map(|(a, b)| relative_error(a, b));
    errors.fold(0.0, f64::max)
}

/// Whether a model has experts: a difference in the last place may send a token elsewhere.
fn routes(model: &Model) -> bool {
    model.config().moe.is_some()
}

/// Products are sums of the same integers and attention is f32: what differs is the order of sums of floats
/// and the last place of exponentials. With 32 layers of 4 matrices that would be 128 roundings of 2^-24,
/// 8e-6 if all were alike; but where such a difference moves a value over the border between two quants the
/// result jumps by as much as with a cache in half precision. So either it is below 1e-5, or no jump is more
/// than some times what that does to the CPU's own results.
#[test]
fn quantized_models_give_what_the_cpu_gives() {
    each_model(
        &[WeightFormat::Q8, WeightFormat::Q4],
        |what, model, folder| {
            let (cpu, ids) = (open(folder, model.format()), prompt(model, 11, 1));
            let of = |model, kind| all_logits(model, with_cache(kind, run(8, 32)), &ids);
            let [exact, half] = [KvType::F32, KvType::F16].map(|kind| of(&cpu, kind));
            let jump = worst(&half, &exact);
            let error = worst(&of(model, KvType::F32), &exact);
            assert!(
                error < 1e-5 || error < 4.0 * jump,
                "{what}: {error:e}, {jump:e}"
            );
            if what.contains("host") {
                assert!(
                    error < 1e-5,
                    "{what}: {error:e} where arithmetic is the same"
                );
            }
            if !routes(model) {
                let error = worst(&of(model, KvType::F16), &half);
                assert!(
                    error < 4.0 * jump,
                    "{what}: {error:e} with a cache in f16, {jump:e}"
                );
            }
        },
    );
}

/// Activations are rounded to bf16, by 2^-9 of each at most. A layer has four products after another, and the
/// head is one more; their errors add like noise: `sqrt(4 layers + 1) * 2^-9`, four times that for the
/// largest of many rows, and for what the norms and attention in half precision make of it.
#[test]
fn bf16_models_are_as_near_as_their_activations() {
    each_model(&[WeightFormat::Bf16], |what, model, folder| {
        if routes(model) {
            return;
        }
        let (cpu, ids) = (open(folder, WeightFormat::Bf16), prompt(model, 11, 1));
        let got = all_logits(model, run(8, 32), &ids);
        let error = worst(&got, &all_logits(&cpu, run(8, 32), &ids));
        let layers = model.config().num_hidden_layers as f64;
        let bound = 4.0 * (4.0 * layers + 1.0).sqrt() / 512.0;
        assert!(error < bound, "{what}: {error:e} over {bound:e}");
    });
}

/// However a sequence is cut into passes, and however large the cache is; tokens one by one are done once,
/// recorded, and then replayed.
#[test]
fn passes_and_contexts_do_not_change_a_bit() {
    let formats = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4];
    each_model(&formats, |what, model, _| {
        let ids = prompt(model, 21, 2);
        let want = all_logits(model, run(64, 32), &ids);
        for (chunk, context) in [(3, 32), (8, 64), (16, 21)] {
            let got = all_logits(model, run(chunk, context), &ids);
            assert_same(&got, &want, &format!("{what}, chunks of {chunk}"));
        }
        let mut alone = session(model, run(64, 63));
        let each = ids.iter().map(|id| alone.extend(&[*id]).unwrap().to_vec());
        assert_same(
            &each.collect::<Vec<_>>(),
            &want,
            &format!("{what}, one by one"),
        );
    });
}

/// Passes of one token, of guesses and of prompts, which move the buffers that recordings know; back, and on.
#[test]
fn recorded_passes_survive_what_comes_between() {
    let formats = [WeightFormat::Q8];
    each_model(&formats, |what, model, _| {
        let ids = prompt(model, 30, 3);
        let want = all_logits(model, run(512, 64), &ids);
        let mut session = session(model, run(512, 64));
        let mut at = 0;
        let mut go = |session: &mut Session, n: usize| {
            let mut rows = Vec::new();
            let tokens = &ids[at..at + n];
            (session.extend_all(tokens, |_, row| rows.push(row.to_vec()))).unwrap();
            assert_same(&rows, &want[at..at + n], &format!("{what}, {n} at {at}"));
            at += n;
        };
        for n in [1, 1, 1, 4, 1, 4, 1, 9, 1, 1, 4] {
            go(&mut session, n);
        }
        session.truncate(at - 6);
        at -= 6;
        let mut go = |session: &mut Session, n: usize| {
            let got = session.extend(&ids[at..at + n]).unwrap().to_vec();
            at += n;
            assert_same(
                &[got],
                &want[at - 1..at],
                &format!("{what}, {n} before {at}"),
            );
        };
        for n in [1, 1, 4, 1, 1] {
            go(&mut session, n);
        }
    });
}

#[test]
fn a_cancelled_pass_leaves_no_trace() {
    each_device(|device, folder| {
        let model = open_on(device, folder, WeightFormat::Q8);
        let ids = prompt(&model, 8, 4);
        let want = all_logits(&model, run(64, 16), &ids);
        let mut session = session(&model, run(64, 16));
        // Cancelled when it is done for the first time, when it is recorded, when it is replayed.
        for (i, id) in ids.iter().enumerate() {
            let cancel = Cancel::default();
            cancel.cancel();
            session.set_cancel(cancel);
            let error = session.extend(&[*id]).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
            assert_eq!((session.ids().len(), session.cache().len()), (i, i));
            session.set_cancel(Cancel::default());
            let got = session.extend(&[*id]).unwrap().to_vec();
            assert_same(&[got], &want[i..=i], "after a cancelled pass");
        }
    });
}

/// A launch that fails ends the pass with an error, wherever it is: done for the first time, recorded, replayed.
/// Nothing of the pass stays, and a device that works again gives the same bits.
#[test]
fn a_failed_launch_ends_the_pass_and_nothing_else() {
    let Ok(host) = HostDevice::new(Order::Forward) else {
        return; // `devices` says so
    };
    let device: Arc<dyn Device> = Arc::new(host.clone());
    let folder = text_fixtures().remove(0);
    let model = open_on(&device, &folder, WeightFormat::Q8);
    let ids = prompt(&model, 12, 7);
    let want = all_logits(&model, run(64, 16), &ids);
    let mut session = session(&model, run(64, 16));
    for (i, id) in ids.iter().enumerate() {
        host.lose_after(Some(3 * i % 16));
        let error = session.extend(&[*id]).unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error}");
        for words in ["host device", "the device is lost", "told to be"] {
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!((session.ids().len(), session.cache().len()), (i, i));
        // Once, so that recordings are made and replayed between failures.
        if i % 4 == 3 {
            continue_after(&host, &mut session, &ids[i..], &want[i..]);
            session.truncate(i);
        }
        host.lose_after(None);
        let got = session.extend(&[*id]).unwrap().to_vec();
        assert_same(&[got], &want[i..=i], "after a launch that failed");
    }
}

/// The rest of the tokens, one by one, on a device that works again.
fn continue_after(host: &HostDevice, session: &mut Session, ids: &[u32], want: &[Vec<f32>]) {
    host.lose_after(None);
    for (id, want) in ids.iter().zip(want) {
        let got = session.extend(&[*id]).unwrap().to_vec();
        assert_same(&[got], std::slice::from_ref(want), "after a failure");
    }
}

#[test]
fn a_model_that_is_cancelled_on_its_way_to_the_device_is_not_there() {
    where_bytes_are_counted(&text_fixtures()[..1], |device, folder| {
        let before = device.free_memory().unwrap();
        let options = common::options(WeightFormat::Q8);
        let mut model = Model::open(folder, options).unwrap();
        let cancel = Cancel::default();
        let put = model.put_on(Arc::clone(device), &cancel, &mut |_, _| cancel.cancel());
        assert!(matches!(put, Err(Error::Cancelled)), "{put:?}");
        assert!(model.resident().is_none());
        assert_eq!(device.free_memory().unwrap(), before);
    });
}

/// Turning the keys in the cache is done on the host, whatever holds them.
#[test]
fn the_cache_is_turned_as_on_the_cpu() {
    let mut turned = 0;
    each_model(&[WeightFormat::F32], |what, model, folder| {
        let Some(long) = model.config().rope.long.as_ref() else {
            return;
        };
        let original = long.original_max_position_embeddings;
        if original > 64 {
            return;
        }
        let ids = prompt(model, original + 5, 5);
        let logits = |model: &Arc<Model>| {
            let options = SessionOptions {
                crossing: Crossing::Rotate,
                ..run(16, original + 5)
            };
            let mut session = session(model, options);
            session.extend(&ids[..original]).unwrap();
            let logits = session.extend(&ids[original..]).unwrap().to_vec();
            let key = session.cache().read(0, 0, original / 2).unwrap().0;
            (logits, key)
        };
        let (got, want) = (logits(model), logits(&open(folder, WeightFormat::F32)));
        for (got, want) in [(got.0, want.0), (got.1, want.1)] {
            let error = relative_error(&got, &want);
            assert!(error < 1e-4, "{what}: {error:e}");
        }
        turned += 1;
    });
    assert!(
        turned > 0 || devices().is_empty(),
        "no model with two lists of factors"
    );
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    // Those that are made have every kind of buffer between them.
    let folders = folders();
    let made = &folders.list[folders.list.len() - 4..];
    where_bytes_are_counted(made, |device, folder| {
        let options = || common::options(WeightFormat::Q8);
        let free = device.free_memory().unwrap();
        let held = Memory::new(device, free - 4096).unwrap();
        let mut model = Model::open(folder, options()).unwrap();
        let left = device.free_memory().unwrap();
        let put = model.put_on(Arc::clone(device), &Cancel::default(), &mut |_, _| {});
        let Err(Error::DeviceWeights { needed, free, .. }) = put else {
            panic!("{put:?}");
        };
        assert!(needed > left && free == left, "{needed}, {free}, {left}");
        drop(held);

        let model = open_on(device, folder, WeightFormat::Q8);
        let held = Memory::new(device, device.free_memory().unwrap() - 4096).unwrap();
        let refused = Session::new(Arc::clone(&model), &run(16, 64)).err();
        let message = refused.map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains("not enough memory"), "{message}");
        assert!(message.contains("KV cache"), "{message}");
        drop(held);
        let plan = Session::plan(&model, &run(16, 64)).unwrap();
        assert_eq!(plan.weights, model.resident().unwrap().bytes());
        let before = device.free_memory().unwrap();
        let mut session = session(&model, run(16, 64));
        session.extend(&prompt(&model, 40, 6)).unwrap();
        every_recording(&mut session);
        let taken = before - device.free_memory().unwrap();
        let planned = plan.total() - plan.weights;
        // Not every model has every buffer, or every launch.
        let most = taken + 10 * device.piece() + (512 << 10);
        assert!(
            taken <= planned && planned <= most,
            "{}: {taken} bytes taken, {planned} planned",
            folder.display()
        );
    });
}

/// Passes of all lengths that come again, in two ways each: more of them than a session keeps. Each gives every time
/// what it gives first, whether its recording made room for others or not.
fn every_recording(session: &mut Session) {
    let len = session.ids().len();
    let ids: Vec<u32> = session.ids()[..8].to_vec();
    let mut first = Vec::new();
    for _ in 0..4 {
        let mut all = Vec::new();
        for count in 1..=ids.len() {
            session.truncate(len);
            all.push(session.extend(&ids[..count]).unwrap().to_vec());
            session.truncate(len);
            let each = session.extend_all(&ids[..count], |_, row| all.push(row.to_vec()));
            each.unwrap();
        }
        if first.is_empty() {
            first.clone_from(&all);
        }
        assert_same(&all, &first, "a pass that comes again");
    }
}

/// A session's recordings are taken from the memory that the plan says, and given back.
#[test]
fn recordings_are_counted() {
    let folders = folders();
    let made = &folders.list[folders.list.len() - 4..];
    where_bytes_are_counted(made, |device, folder| {
        let model = open_on(device, folder, WeightFormat::Q8);
        let plan = Session::plan(&model, &run(16, 64)).unwrap();
        let whole = device.free_memory().unwrap();
        let mut session = session(&model, run(16, 64));
        // Too many for a pass that comes again, and few enough that no model crosses to other factors below.
        session.extend(&prompt(&model, 9, 6)).unwrap();
        let ids = session.ids()[..8].to_vec();
        let mut pass = |count: usize| {
            session.truncate(9);
            session.extend(&ids[..count]).unwrap();
            device.free_memory().unwrap()
        };
        // Once for the buffers, the longest first.
        let before = (1..=8).rev().map(&mut pass).last().expect("some");
        let mut taken = 0;
        for count in 1..=8 {
            let one = before - taken - pass(count);
            assert!(one > 0 && 8 * one <= plan.recordings, "{one} of {plan}");
            // The plan counts launches that only other shapes need.
            assert!(plan.recordings <= 16 * one, "{one} of {plan}");
            taken += one;
            // What is recorded takes nothing more.
            assert_eq!(pass(count), before - taken);
        }
        drop(session);
        assert_eq!(device.free_memory().unwrap(), whole);
    });
}

/// Before a weight is read, from shapes alone: byte for byte what the model says that was put there.
#[test]
fn a_folder_tells_what_its_model_will_take() {
    let formats = [
        WeightFormat::F32,
        WeightFormat::Bf16,
        WeightFormat::Q8,
        WeightFormat::Q4,
    ];
    let mut folders = folders();
    let sees = folders.list[0].with_file_name("phi3v-tiny-nc4");
    folders.list.push(sees);
    // Tied, and yet with a head in the file, which is not read.
    let two_heads = folders.made.path().join("two-heads");
    let tied = changed(config(), "tie_word_embeddings", json!(true));
    write_model(&two_heads, &tied, &weights(&config(), "BF16", 7));
    folders.list.push(two_heads);
    where_bytes_are_counted(&folders.list, |device, folder| {
        for format in formats {
            let source = Source::open(folder).unwrap();
            let (format, weights) = source.planned(Some(format)).unwrap();
            let plan = memory_plan(&source.config, format, weights, &run(16, 64)).unwrap();
            let told = source
                .plan_on(&**device, format, &run(16, 64), plan)
                .unwrap();
            let before = device.free_memory().unwrap();
            let model = open_on(device, folder, format);
            let taken = before - device.free_memory().unwrap();
            assert_eq!(
                told,
                Session::plan(&model, &run(16, 64)).unwrap(),
                "{} in {format}",
                folder.display()
            );
            assert_eq!(told.weights, taken, "{} in {format}", folder.display());
        }
    });
}

#[test]
fn a_cache_of_another_type_is_refused() {
    each_device(|device, folder| {
        let model = open_on(device, folder, WeightFormat::Q8);
        for kind in [KvType::Bf16, KvType::Int8] {
            let refused = Session::new(Arc::clone(&model), &with_cache(kind, run(16, 64))).err();
            let message = refused.map(|error| error.to_string()).unwrap_or_default();
            let want = format!("the KV cache on a GPU is f16 or f32, not {}", kind.name());
            assert_eq!(message, want);
        }
    });
}

#[test]
fn heads_that_the_kernels_lack_are_refused() {
    let made = TempDir::new().unwrap();
    // Four heads of 12.
    let wide = changed(config(), "hidden_size", json!(48));
    write_model(made.path(), &wide, &weights(&wide, "F32", 9));
    each_device(|device, _| {
        let mut model = Model::open(made.path(), common::options(WeightFormat::F32)).unwrap();
        let put = model.put_on(Arc::clone(device), &Cancel::default(), &mut |_, _| {});
        let message = put.unwrap_err().to_string();
        assert!(message.contains("heads of 12 elements"), "{message}");
    });
}

/// A session that says all logits, whatever would do.
struct Whole(Session);

impl Sequence for Whole {
    type Error = Error;
    fn ids(&self) -> &[u32] {
        self.0.ids()
    }
    fn vocab(&self) -> usize {
        self.0.vocab()
    }
    fn context(&self) -> usize {
        self.0.context()
    }
    fn extend(
        &mut self,
        tokens: &[u32],
        rows: usize,
        _: Option<usize>,
        each: &mut dyn FnMut(usize, Next<'_>),
    ) -> Result<(), Error> {
        Sequence::extend(&mut self.0, tokens, rows, None, each)
    }
    fn logits(&mut self, position: usize) -> Result<&[f32], Error> {
        panic!("logits at {position} that were said already")
    }
    fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }
    fn lookahead(&self) -> usize {
        self.0.lookahead()
    }
}

/// Ids for text.
struct Numbers;

impl Detokenize for Numbers {
    type Error = Infallible;
    fn push(&mut self, id: u32) -> Result<String, Infallible> {
        Ok(format!("{id} "))
    }
    fn finish(&mut self) -> Result<String, Infallible> {
        Ok(String::new())
    }
}

/// An answer of some tokens; `heard` is called for each event.
fn answer<S: Sequence>(
    sequence: &mut S,
    prompt: &[u32],
    options: &GenerateOptions,
    mut heard: impl FnMut(Event),
) -> Outcome {
    let cancel = Cancel::default();
    let outcome = generate(sequence, prompt, options, &mut Numbers, &cancel, |event| {
        heard(event);
        ControlFlow::Continue(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"))
}

/// However tokens are chosen, and with guesses: the same tokens, texts and probabilities as from all logits.
/// Each kind of parameters is gone through twice, so that passes of all kinds were recorded.
#[test]
fn candidates_give_the_answers_of_all_logits() {
    let hot = || SamplingParams {
        temperature: 1.1,
        seed: 7,
        ..SamplingParams::default()
    };
    let cases = [
        SamplingParams::default(),
        SamplingParams { top_k: 1, ..hot() },
        SamplingParams {
            top_k: 20,
            top_p: 0.8,
            min_p: 0.05,
            ..hot()
        },
        SamplingParams {
            top_p: 0.3,
            ..hot()
        },
        SamplingParams {
            top_p: 0.95,
            ..hot()
        },
        SamplingParams {
            min_p: 0.4,
            ..hot()
        },
        hot(),
        SamplingParams {
            top_k: 9,
            repeat_penalty: 1.2,
            ..hot()
        },
        SamplingParams {
            logprobs: Some(2),
            ..SamplingParams::default()
        },
    ];
    let folder = TempDir::new().unwrap();
    // More tokens than candidates; some of them are none.
    let config = changed(small_config(), "vocab_size", json!(700));
    write_model(folder.path(), &config, &weights(&config, "F32", 8));
    for device in devices() {
        let model = open_on(&device, folder.path(), WeightFormat::Q8);
        let context = 300;
        let new = || session(&model, run(16, context));
        let (mut whole, mut part) = (Whole(new()), new());
        for round in 0..2 {
            for (i, sampling) in cases.iter().enumerate() {
                let options = GenerateOptions {
                    max_new_tokens: 10,
                    sampling: sampling.clone(),
                    lookup: 3 * ((i + round) % 2),
                    ..GenerateOptions::default()
                };
                // A word said over and over, so that there is something to guess.
                let ids = prompt(&model, 4, i as u64).repeat(3);
                let (mut want, mut got) = (Vec::new(), Vec::new());
                whole.truncate(0);
                part.truncate(0);
                let outcome = answer(&mut whole, &ids, &options, |event| want.push(event));
                let same = answer(&mut part, &ids, &options, |event| got.push(event));
                let what = format!("{sampling:?} on {}", device.name());
                assert_eq!(got, want, "{what}");
                assert_eq!(
                    (same.ids, same.lookup),
                    (outcome.ids, outcome.lookup),
                    "{what}"
                );
                assert_eq!(part.ids(), whole.ids(), "{what}");
            }
        }
    }
}

/// One copy there: the token, its position, its rotation. One back: the candidates, or also the logits
/// where those did not suffice, or the logits alone where they never would.
#[test]
fn a_token_costs_one_small_copy_each_way() {
    let Ok(host) = HostDevice::new(Order::Forward) else {
        assert!(
            devices()
                .iter()
                .all(|device| !device.name().contains("host"))
        );
        return;
    };
    let folder = TempDir::new().unwrap();
    let vocab = 2000;
    let config = changed(config(), "vocab_size", json!(vocab));
    write_model(folder.path(), &config, &weights(&config, "F32", 10));
    let device: Arc<dyn Device> = Arc::new(host.clone());
    let model = open_on(&device, folder.path(), WeightFormat::Q8);
    let hot = || SamplingParams {
        temperature: 0.8,
        ..SamplingParams::default()
    };
    let (row, of) = (vocab * 4, |count| candidate_values(count) * 4);
    let cases = [
        (SamplingParams::default(), 1, of(1)),
        (
            SamplingParams {
                top_k: 50,
                top_p: 0.95,
                ..hot()
            },
            1,
            of(64),
        ),
        (
            SamplingParams {
                top_p: 0.01,
                ..hot()
            },
            1,
            of(MOST),
        ),
        (
            SamplingParams {
                min_p: 0.9,
                ..hot()
            },
            1,
            of(MOST),
        ),
        (
            SamplingParams {
                top_p: 0.999,
                ..hot()
            },
            2,
            of(MOST) + row,
        ),
        (hot(), 1, row),
        (
            SamplingParams {
                repeat_penalty: 1.1,
                ..SamplingParams::default()
            },
            1,
            row,
        ),
    ];
    let mut session = session(&model, run(16, 64));
    for (sampling, downloads, downloaded) in cases {
        let options = GenerateOptions {
            max_new_tokens: 6,
            sampling,
            ..GenerateOptions::default()
        };
        session.truncate(0);
        let mut copied = Vec::new();
        answer(&mut session, &prompt(&model, 5, 1), &options, |_| {
            copied.push(host.take_traffic());
        });
        // The prompt is in the first one.
        assert_eq!(copied.len(), 6);
        for traffic in &copied[1..] {
            let want = Traffic {
                uploads: 1,
                uploaded: traffic.uploaded,
                downloads,
                downloaded,
            };
            assert_eq!(*traffic, want, "{:?}", options.sampling);
            // Four parts of 64 words.
            assert!(traffic.uploaded <= 1024, "{traffic:?}");
        }
    }
}

/// A prompt in chunks, then one by one: done, recorded and replayed.
#[test]
fn experts_count_their_tokens_as_on_the_cpu() {
    let mut counted = 0;
    each_model(&[WeightFormat::F32], |what, model, folder| {
        let cpu = open(folder, WeightFormat::F32);
        let ids = prompt(model, 26, 9);
        let [got, want] = [model, &cpu].map(|model| {
            let mut session = session(model, run(16, 32));
            let mut take = |ids: &[u32], each: usize| {
                for ids in ids.chunks(each) {
                    session.extend(ids).unwrap();
                }
                session.take_routing().unwrap()
            };
            [take(&[], 1), take(&ids[..21], 21), take(&ids[21..], 1)]
        });
        assert_eq!(got[0], [], "{what}");
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert_eq!(got, want, "{what}");
            counted += got.tokens.iter().sum::<u64>();
        }
        assert_eq!(got.each_ref().map(Vec::len), want.each_ref().map(Vec::len));
    });
    assert!(counted > 0 || devices().is_empty(), "no model with experts");
}
