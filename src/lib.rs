//! Phidias runs the Phi-3 / 3.5 family of small language models on ordinary CPUs.
//!
//! Ask a question, the text arrives as it becomes certain:
//!
//! ```
//! # #[cfg(feature = "fable")] {
//! use phidias::{ask, models::fable, OpenOptions};
//!
//! let model = fable::open(OpenOptions::default())?.into();
//! let answer = ask(&model, "Tell me a short story about a fox.", |text| print!("{text}"))?;
//! assert!(!answer.is_empty());
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A real model is opened with [`Model::open`]. Below [`ask`] are the parts it is made of:
//! [`models::text`] turns messages into token ids, a [`Session`] turns ids into logits and keeps the
//! KV cache, [`generate`] samples and decodes. Logits alone, after each token of a prompt:
//!
//! ```
//! # #[cfg(feature = "fable")] {
//! use phidias::{models::fable, OpenOptions, Session, SessionOptions, WeightFormat};
//!
//! let options = OpenOptions { format: Some(WeightFormat::F32), ..OpenOptions::default() };
//! let model = fable::open(options)?.into();
//! let mut session = Session::new(model, &SessionOptions::default())?;
//! session.extend_all(&[1, 343, 1415], |position, logits| {
//!     println!("after token {position}: {} logits", logits.len());
//! })?;
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

use phidias_engine::sampling::SamplingParams;
use phidias_models::text::{Detokenizer, GenerationPrompt, Message, Special, TextError};
use std::ops::ControlFlow;
use std::sync::Arc;

pub mod bench;
pub mod eval;
#[cfg(feature = "hub")]
pub mod hub;
pub mod lookup;

pub use phidias_engine as engine;
pub use phidias_engine::generate::{Event, FinishReason, GenerateOptions, Outcome, generate};
pub use phidias_models as models;
pub use phidias_models::{Clip, Error, Model, OpenOptions, Session, SessionOptions, WeightFormat};

/// Why a question has no answer.
pub type AskError = engine::generate::GenerateError<Error, TextError>;

/// How a model wants to be sampled when nothing else is asked: its own `generation_config.json`,
/// which for Phi-3 means the likeliest token each time; and its stop tokens.
#[must_use]
pub fn default_options(model: &Model) -> GenerateOptions {
    let own = model.generation();
    let neutral = SamplingParams::default();
    GenerateOptions {
        stop_tokens: model.stop_tokens().clone(),
        sampling: SamplingParams {
            temperature: own.temperature.unwrap_or(neutral.temperature),
            top_k: own.top_k.unwrap_or(neutral.top_k),
            top_p: own.top_p.unwrap_or(neutral.top_p),
            min_p: own.min_p.unwrap_or(neutral.min_p),
            repeat_penalty: own.repetition_penalty.unwrap_or(neutral.repeat_penalty),
            ..neutral
        },
        ..GenerateOptions::default()
    }
}

/// The ids of a question in the model's chat template.
/// # Errors
/// A model without a tokenizer; a question that cannot be encoded.
pub fn question_ids(model: &Model, question: &str) -> Result<Vec<u32>, Error> {
    let text = model.text()?;
    let prompt = text
        .template
        .render(&[Message::user(question)], GenerationPrompt::Add)?;
    Ok(text
        .tokenizer
        .encode(&prompt, text.tokenizer.default_bos())?)
}

/// Asks one question with the model's own defaults. `on_text` hears the answer piece by piece; the
/// whole of it is returned.
/// # Errors
/// A model without a tokenizer, a question beyond the context, memory or threads that cannot be had.
pub fn ask(
    model: &Arc<Model>,
    question: &str,
    mut on_text: impl FnMut(&str),
) -> Result<String, AskError> {
    let ids = question_ids(model, question).map_err(AskError::Sequence)?;
    let mut session =
        Session::new(Arc::clone(model), &SessionOptions::default()).map_err(AskError::Sequence)?;
    let tokenizer = &model.text().map_err(AskError::Sequence)?.tokenizer;
    let mut detokenizer = Detokenizer::new(tokenizer, Special::Skip);
    let mut answer = String::new();
    let cancel = engine::Cancel::default();
    generate(
        &mut session,
        &ids,
        &default_options(model),
        &mut detokenizer,
        &cancel,
        |event| {
            let (Event::Token { text, .. } | Event::Text(text)) = event;
            on_text(&text);
            answer += &text;
            ControlFlow::Continue(())
        },
    )?;
    Ok(answer)
}
