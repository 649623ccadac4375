//! Prompt lookup on real models: an answer, and the session it leaves behind, do not depend on it.

mod common;

use common::*;
use phidias::engine::Cancel;
use phidias::engine::generate::{Detokenize, FinishReason, GenerateOptions, Outcome, generate};
use phidias::engine::kv_cache::KvType;
use phidias::engine::lookup::MAX_LOOKUP;
use phidias::engine::sampling::SamplingParams;
use phidias::models::session::Crossing;
use phidias::{Event, Model, Session, SessionOptions, WeightFormat};
use proptest::prelude::*;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};

/// Bytes for tokens that have no text: letters, and characters cut in two.
#[derive(Default)]
struct Letters(Vec<u8>);

impl Detokenize for Letters {
    type Error = Infallible;
    fn push(&mut self, id: u32) -> Result<String, Infallible> {
        const PIECES: [&[u8]; 6] = [b"a", b"bc", b" ", b"\xc3", b"\xa9", b"cab"];
        self.0.extend_from_slice(PIECES[id as usize % PIECES.len()]);
        let cut = self.0.iter().rposition(|b| *b == 0xc3);
        let held = cut.filter(|cut| cut + 1 == self.0.len());
        let rest = self.0.split_off(held.unwrap_or(self.0.len()));
        let whole = std::mem::replace(&mut self.0, rest);
        Ok(String::from_utf8_lossy(&whole).into_owned())
    }
    fn finish(&mut self) -> Result<String, Infallible> {
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned())
    }
}

/// Everything that can be known of an answer but its cost: what was told on the way, how it ended, and
/// what the session computes next.
#[derive(Debug, PartialEq)]
struct Known {
    events: Vec<Event>,
    ids: Vec<u32>,
    pending: Option<u32>,
    finish: FinishReason,
    held: Vec<u32>,
    cached: usize,
    next: Option<Vec<u32>>, // bits of the logits after one token more
}

fn known(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    detokenizer: &mut impl Detokenize,
    break_at: usize,
) -> (Known, Outcome) {
    let mut events = Vec::new();
    let cancel = Cancel::default();
    let outcome = generate(session, prompt, options, detokenizer, &cancel, |event| {
        events.push(event);
        match events.len() == break_at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    let outcome = outcome.unwrap_or_else(|e| panic!("{e}"));
    let stats = outcome.lookup;
    assert_eq!(
        stats.passes + stats.accepted,
        outcome.ids.len().saturating_sub(1)
    );
    let held = session.ids().to_vec();
    let cached = session.cache().len();
    let next = outcome.pending.and_then(|id| {
        let logits = session.extend(&[id]).ok()?;
        Some(logits.iter().map(|v| v.to_bits()).collect())
    });
    let known = Known {
        events,
        ids: outcome.ids.clone(),
        pending: outcome.pending,
        finish: outcome.finish,
        held,
        cached,
        next,
    };
    (known, outcome)
}

fn run(context: usize) -> SessionOptions {
    SessionOptions {
        context: Some(context),
        threads: Some(2),
        ..SessionOptions::default()
    }
}

/// Every fixture in every format, opened once.
fn models() -> &'static [Arc<Model>] {
    static MODELS: OnceLock<Vec<Arc<Model>>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let folders = text_fixtures().into_iter();
        folders
            .flat_map(|folder| WeightFormat::ALL.map(|format| open(&folder, format)))
            .collect()
    })
}

fn original(model: &Model) -> Option<usize> {
    let long = model.config().rope.long.as_ref()?;
    Some(long.original_max_position_embeddings)
}

/// A prompt that repeats itself: `period` random tokens round and round.
fn round(model: &Model, period: usize, len: usize, seed: u64) -> Vec<u32> {
    let ids = Random(seed).ids(period, model.config().vocab_size);
    ids.into_iter().cycle().take(len).collect()
}

/// Makes a model repeat itself, as trained ones do: random weights prefer few tokens.
fn few(model: &Model, n: u64, seed: u64) -> Vec<(u32, f32)> {
    let vocab = model.config().vocab_size as u64;
    let first = seed % (vocab - n);
    (first..first + n).map(|id| (id as u32, 25.0)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn answers_do_not_depend_on_lookup(
        model in 0usize..1000,
        lookup in prop_oneof![1usize..=8, Just(MAX_LOOKUP)],
        before in 1usize..30,
        period in 2usize..12,
        n in 0usize..60,
        chunk in prop_oneof![Just(1usize), 2usize..6, Just(512)],
        rotate: bool,
        kv in 0..KvType::ALL.len(),
        temperature in prop_oneof![Just(0.0f32), 0.3f32..1.2],
        penalties in (prop_oneof![Just(1.0f32), 0.8f32..1.5], 0.0f32..0.5, 0.0f32..0.5),
        repeat_last_n in prop_oneof![Just(None), (0usize..20).prop_map(Some)],
        bias in prop_oneof![Just(0u64), 2u64..5],
        stop in proptest::option::of("[abc é]{3,5}"),
        stop_token in proptest::option::of(0u32..512),
        room in 0usize..70,
        break_at in 0usize..200,
        seed: u64,
    ) {
        let model = &models()[model % models().len()];
        // Around the length at which LongRoPE changes where there is one.
        let len = original(model).map_or(before, |o| o.saturating_sub(before)).max(1);
        let prompt = round(model, period, len, seed);
        let context = (len + room).min(model.config().max_position_embeddings);
        let (repeat_penalty, frequency_penalty, presence_penalty) = penalties;
        let sampling = SamplingParams {
            temperature,
            repeat_penalty,
            frequency_penalty,
            presence_penalty,
            repeat_last_n,
            seed,
            logit_bias: if bias > 0 { few(model, bias, seed) } else { Vec::new() },
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        let answer = |lookup| {
            let mut session = session(model, SessionOptions {
                chunk,
                kv_type: Some(KvType::ALL[kv]),
                crossing: if rotate { Crossing::Rotate } else { Crossing::Exact },
                ..run(context)
            });
            let options = GenerateOptions {
                max_new_tokens: n,
                stop_tokens: stop_token.into_iter().collect(),
                stop_strings: stop.clone().into_iter().collect(),
                sampling: sampling.clone(),
                lookup,
            };
            known(&mut session, &prompt, &options, &mut Letters::default(), break_at).0
        };
        prop_assert_eq!(answer(lookup), answer(0));
    }
}

/// The property above can fail: guesses are made, some right and some wrong, on both sides of the
/// original length; and every length of guess, format and fixture has its turn.
#[test]
fn guesses_are_right_and_wrong_on_both_sides_of_the_original_length() {
    let mut wrong = 0;
    for model in models() {
        let len = original(model).map_or(20, |o| o - 10);
        let context = model.config().max_position_embeddings.min(100);
        let prompt = round(model, 5, len, 1);
        for temperature in [0.0, 3.0] {
            let answer = |lookup| {
                let mut options = GenerateOptions {
                    max_new_tokens: 40,
                    lookup,
                    ..GenerateOptions::default()
                };
                options.sampling.temperature = temperature;
                options.sampling.logit_bias = few(model, 3, 7);
                options.sampling.logprobs = Some(1);
                let mut session = session(model, run(context));
                known(
                    &mut session,
                    &prompt,
                    &options,
                    &mut Letters::default(),
                    usize::MAX,
                )
            };
            let (plain, _) = answer(0);
            for lookup in [1, 2, 3, 5, 8, MAX_LOOKUP] {
                let (with, outcome) = answer(lookup);
                assert_eq!(with, plain);
                let stats = outcome.lookup;
                assert!(stats.accepted > 0, "{temperature} {lookup}: {stats:?}");
                wrong += stats.proposed - stats.accepted;
            }
        }
    }
    assert!(wrong > 1000, "{wrong}");
}

/// No pass holds tokens of both regimes, and the first one beyond the original length is not delayed.
#[test]
fn a_pass_does_not_cross_the_original_length() {
    for model in models() {
        let Some(original) = original(model) else {
            continue;
        };
        use phidias::engine::generate::Sequence;
        let mut session = session(model, run(original + 9));
        session.extend(&round(model, 3, original - 3, 1)).unwrap();
        // Two more beside the next one, then one, then none; beyond it up to the context.
        for room in [2, 1, 0, 8, 7] {
            assert_eq!(session.lookahead(), room, "after {}", session.ids().len());
            session.extend(&[1]).unwrap();
        }
    }
}

/// Stopped inside a pass of several tokens: the answer so far stays, the pass leaves no trace.
#[test]
fn a_pass_of_guesses_can_be_cancelled() {
    let model = &models()[0];
    let prompt = round(model, 4, 16, 2);
    let cancel = Cancel::default();
    // Tokens one by one, so that there is a place inside the pass to stop at.
    let mut session = session(
        model,
        SessionOptions {
            chunk: 1,
            ..run(200)
        },
    );
    session.set_cancel(cancel.clone());
    let switch = cancel.clone();
    session.set_progress(move |p| {
        if p.total > 2 && p.total < 10 && p.done == 2 {
            switch.cancel();
        }
    });
    let mut options = GenerateOptions {
        max_new_tokens: 100,
        lookup: 6,
        ..GenerateOptions::default()
    };
    options.sampling.logit_bias = few(model, 1, 7);
    let mut letters = Letters::default();
    let outcome = generate(
        &mut session,
        &prompt,
        &options,
        &mut letters,
        &cancel,
        |_| ControlFlow::Continue(()),
    )
    .unwrap();
    assert_eq!(outcome.finish, FinishReason::Cancelled);
    assert!(outcome.ids.len() > 1 && outcome.pending == outcome.ids.last().copied());
    let whole = [&prompt[..], &outcome.ids].concat();
    assert_eq!(session.ids(), &whole[..whole.len() - 1]);
    cancel.reset();
    let next = session.extend(&whole[whole.len() - 1..]).unwrap().to_vec();
    let fresh = all_logits(model, run(200), &whole);
    assert_eq!(Some(&next), fresh.last());
}

#[cfg(feature = "fable")]
mod fable {
    use super::*;
    use phidias::engine::lookup::LookupStats;
    use phidias::lookup::{SAMPLES, lookup_rate, text_ids, text_rate};
    use phidias::models::fable;
    use phidias::models::text::{Detokenizer, Special};
    use phidias::{OpenOptions, default_options, question_ids};

    fn open(format: WeightFormat) -> Arc<Model> {
        let options = OpenOptions {
            format: Some(format),
            ..OpenOptions::default()
        };
        Arc::new(fable::open(options).unwrap())
    }

    /// Real text, its stop tokens and its detokenizer, beyond the original length and to the end of
    /// the context.
    #[test]
    fn a_story_is_the_same_story() {
        let model = open(WeightFormat::Q4);
        let tokenizer = &model.text().unwrap().tokenizer;
        let question = question_ids(&model, "Tell me a short story about a fox.").unwrap();
        let tale = text_ids(&model, SAMPLES[0].text).unwrap();
        for (prompt, context, max_new_tokens) in [
            (&question, 1024, 300),
            (&tale, 1024, 300),
            (&tale, tale.len() + 50, 100),
        ] {
            for (temperature, stop) in [(0.0, None), (0.8, None), (0.4, Some("\" said"))] {
                let answer = |lookup| {
                    let mut options = default_options(&model);
                    options.max_new_tokens = max_new_tokens;
                    options.stop_strings.extend(stop.map(str::to_owned));
                    options.lookup = lookup;
                    options.sampling = SamplingParams {
                        temperature,
                        top_p: 0.95,
                        seed: 3,
                        logprobs: Some(2),
                        ..options.sampling
                    };
                    let mut session = session(&model, run(context));
                    let mut detokenizer = Detokenizer::new(tokenizer, Special::Skip);
                    known(&mut session, prompt, &options, &mut detokenizer, usize::MAX).0
                };
                let plain = answer(0);
                for lookup in [1, 8] {
                    assert!(answer(lookup) == plain, "{temperature} {lookup}");
                }
            }
        }
    }

    /// `cargo test --test lookup -- --nocapture` prints the figures.
    #[test]
    fn a_refrain_gives_more_tokens_a_pass_than_plain_prose() {
        let model = open(WeightFormat::Q4);
        let mut session = session(&model, run(1024));
        for lookup in [2, 4, 8, 16] {
            let [refrain, plain] = SAMPLES.map(|sample| {
                let ids = text_ids(&model, sample.text).unwrap();
                let said = text_rate(&mut session, &ids, 1, lookup, |_| {}).unwrap();
                assert_eq!(session.ids(), &ids[..ids.len() - 1]);
                assert_eq!(said.stats, LookupStats::of_text(&ids, 1, lookup));
                assert_eq!(said.tokens, ids.len() - 1);
                let own = lookup_rate(&mut session, &ids, 128, lookup).unwrap();
                assert_eq!(own.tokens, 128);
                let [said, own] = [said, own].map(|r| r.stats.tokens_per_pass().unwrap());
                println!(
                    "{:8} lookup {lookup:2}: {said:.2} tokens a pass, its continuation {own:.2}",
                    sample.name
                );
                said
            });
            assert!(plain < 1.1 && refrain > 1.5, "{plain} {refrain}");
        }
        let said = lookup_rate(&mut session, &[1, 2], 20, 0).unwrap();
        assert_eq!((said.stats.passes, said.stats.proposed), (19, 0));
        assert!(lookup_rate(&mut session, &[1], 20, MAX_LOOKUP + 1).is_err());
    }
}
