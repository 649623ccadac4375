//! Text in, text out: the tokenizer, the incremental detokenizer, chat templates and conversations.
//!
//! | type | is |
//! |---|---|
//! | [`Tokenizer`] | text to ids and back, as a folder's `tokenizer.json` or `.tiktoken` file says |
//! | [`Detokenizer`] | ids one at a time to text, never half a character |
//! | [`ChatTemplate`] | messages to the text of a prompt, as the model was trained on |
//! | [`Conversation`] | several turns, as ids: what was generated is never encoded again |
//! | [`encode_with_images`] | a prompt with pictures in it, as [`Segment`]s |
//!
//! All of it reads files that somebody else wrote. Whatever they hold, the answer is a
//! [`TextError`] that names the file, what was expected and what was found.

mod bounds;
mod chat;
mod conversation;
mod detokenizer;
mod error;
mod files;
mod growth;
mod image_tags;
pub(crate) mod tiktoken;
mod tokenizer;

pub use chat::{Builtin, ChatTemplate, GenerationPrompt, Message, Role};
pub use conversation::{Conversation, PLACEHOLDER};
pub use detokenizer::Detokenizer;
pub use error::{TemplateLimit, TextError};
pub use image_tags::{Segment, encode_with_images};
pub use tokenizer::{Bos, MAX_TEXT_BYTES, Special, Tokenizer};

#[cfg(test)]
mod fixture;
