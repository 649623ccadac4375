//! Everything that can be wrong with a tokenizer, a template or a text.

use std::path::PathBuf;
use std::time::Duration;

/// Why a text could not be encoded, decoded or rendered: one variant per cause.
///
/// `origin` is the path of the file the data came from, or the name given to built-in data.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is there and cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// A file is larger than any file of its kind has reason to be.
    #[error("{path}: larger than {limit} bytes, the most that is read of such a file")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// The most bytes that are read.
        limit: u64,
    },

    /// A text file is not UTF-8.
    #[error("{path}: expected UTF-8 text, found an invalid byte at offset {offset}")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Bytes before the first invalid one.
        offset: usize,
    },

    /// A `tokenizer.json` that the `tokenizers` library does not accept.
    #[error("{origin}: not a usable tokenizer: {reason}")]
    Tokenizer {
        /// The file.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },

    /// Several `.tiktoken` files in one folder: which of them is meant is not known.
    #[error("{}: expected one .tiktoken file, found {}", path.display(), found.join(", "))]
    SeveralVocabularies {
        /// The folder.
        path: PathBuf,
        /// Names of the files.
        found: Vec<String>,
    },

    /// A line of a `.tiktoken` file that is not a token and its rank.
    #[error("{origin}, line {line}: expected {expected}, found {found}")]
    VocabularyLine {
        /// The file.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// What should stand there.
        expected: &'static str,
        /// What stands there, shortened.
        found: String,
    },

    /// A rank of a `.tiktoken` file out of its place: doubled, left out, or not in order.
    #[error("{origin}, line {line}: expected rank {expected}, found {found}")]
    RankOutOfOrder {
        /// The file.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// The rank that follows the line before.
        expected: u32,
        /// The rank that stands there.
        found: u32,
    },

    /// A `.tiktoken` file with fewer or more ranks than there are ids below the special tokens.
    #[error("{origin}, line {line}: expected {expected} ranks in all, found {found}")]
    VocabularySize {
        /// The file.
        origin: String,
        /// The line where the file ends, or has one too many.
        line: usize,
        /// Ids below the special tokens.
        expected: u32,
        /// Ranks up to that line.
        found: u32,
    },

    /// A token that a `.tiktoken` file has twice.
    #[error("{origin}, line {line}: token {token:?} has rank {first} already")]
    DuplicateToken {
        /// The file.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// The token, invalid UTF-8 replaced.
        token: String,
        /// The rank it has.
        first: u32,
    },

    /// A `.tiktoken` file without one of the 256 bytes: some texts could not be written in it.
    #[error("{origin}: no token for the byte 0x{byte:02X}")]
    MissingByte {
        /// The file.
        origin: String,
        /// The byte.
        byte: u8,
    },

    /// A token that merging bytes in the order of the ranks never makes.
    #[error(
        "{origin}, line {line}: token {token:?} is not made of two tokens of lower ranks: \
         merging leaves {parts} parts"
    )]
    UnmergeableToken {
        /// The file.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// The token, invalid UTF-8 replaced.
        token: String,
        /// Tokens of lower ranks that it falls into.
        parts: usize,
    },

    /// A run of white space longer than a text may have for this kind of tokenizer.
    #[error("a run of {chars} white-space characters: at most {limit} can be encoded")]
    SpaceTooLong {
        /// Its length in characters.
        chars: usize,
        /// The limit.
        limit: usize,
    },

    /// A `tokenizer_config.json` or `chat_template.json` that is not a JSON object.
    #[error("{origin}: expected a JSON object: {reason}")]
    Json {
        /// The file.
        origin: String,
        /// What was found.
        reason: String,
    },

    /// A field of a JSON file holds the wrong kind of value.
    #[error("{origin}: `{field}`: expected {expected}, found {found}")]
    Field {
        /// The file.
        origin: String,
        /// The field.
        field: &'static str,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },

    /// `bos_token` or `eos_token` names a token that the tokenizer does not have.
    #[error("{origin}: `{field}` is {token:?}, which is not in the vocabulary")]
    UnknownToken {
        /// The file.
        origin: String,
        /// `bos_token` or `eos_token`.
        field: &'static str,
        /// The token that was named.
        token: String,
    },

    /// A beginning-of-sequence token was asked for and the tokenizer names none.
    #[error("{origin}: a beginning-of-sequence token was asked for, and none is named")]
    NoBos {
        /// The tokenizer.
        origin: String,
    },

    /// A text longer than [`MAX_TEXT_BYTES`](super::MAX_TEXT_BYTES).
    #[error("text of {bytes} bytes: at most {limit} can be encoded at once")]
    TextTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },

    /// A tokenizer whose own replacements make a text too long.
    #[error(
        "{origin}: its normalizer makes a text up to {growth} times longer: one of {bytes} bytes could go \
         beyond {limit} bytes"
    )]
    GrownTooLong {
        /// The tokenizer.
        origin: String,
        /// The text's length.
        bytes: usize,
        /// How many times longer it may become.
        growth: f64,
        /// The limit.
        limit: usize,
    },

    /// The `tokenizers` library could not encode a text.
    #[error("{origin}: cannot encode the text: {reason}")]
    Encode {
        /// The tokenizer.
        origin: String,
        /// What went wrong.
        reason: String,
    },

    /// The `tokenizers` library could not decode ids.
    #[error("{origin}: cannot decode the ids: {reason}")]
    Decode {
        /// The tokenizer.
        origin: String,
        /// What went wrong.
        reason: String,
    },

    /// An id that stands for no token.
    #[error("{origin}: id {id} is no token: the largest id is {max_id}")]
    UnknownId {
        /// The tokenizer.
        origin: String,
        /// The id.
        id: u32,
        /// The largest id of the vocabulary.
        max_id: u32,
    },

    /// The vocabulary has ids for which the model has no embedding.
    #[error(
        "{origin}: token {token:?} has id {max_id}, but the model has only {rows} embedding rows \
         (ids 0 to {rows} exclusive)"
    )]
    MoreIdsThanRows {
        /// The tokenizer.
        origin: String,
        /// The token with the largest id.
        token: String,
        /// The largest id.
        max_id: u32,
        /// Rows of the model's embedding matrix.
        rows: usize,
    },

    /// `chat_template` lists several templates, none of them named `default`.
    #[error("{origin}: `chat_template`: expected one named \"default\", found {found:?}")]
    NoDefaultTemplate {
        /// The file.
        origin: String,
        /// The names that are there.
        found: Vec<String>,
    },

    /// A chat template longer than any has reason to be.
    #[error("{origin}: chat template of {bytes} bytes: at most {limit} are accepted")]
    TemplateTooLong {
        /// Where the template comes from.
        origin: String,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },

    /// A chat template that is not valid Jinja.
    #[error("{origin}: chat template, line {line}: {reason}")]
    TemplateSyntax {
        /// Where the template comes from.
        origin: String,
        /// Line of the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },

    /// A chat template called `raise_exception`: it does not accept these messages.
    #[error("{origin}: the chat template refuses the messages: {message}")]
    TemplateRaised {
        /// Where the template comes from.
        origin: String,
        /// The template's own words.
        message: String,
    },

    /// A chat template failed while it was rendered.
    #[error("{origin}: chat template, line {line}: {reason}")]
    TemplateFailed {
        /// Where the template comes from.
        origin: String,
        /// Line of the template, from 1; 0 where it is not known.
        line: usize,
        /// What went wrong.
        reason: String,
    },

    /// A chat template did not end within the work it is allowed.
    #[error("{origin}: the chat template was stopped after {fuel} units of work")]
    TemplateOutOfFuel {
        /// Where the template comes from.
        origin: String,
        /// Units it was allowed: one per instruction and per 64 bytes made.
        fuel: u64,
    },

    /// A chat template went beyond another bound.
    #[error("{origin}: chat template{}: {limit}", .line.map_or(String::new(), |line| format!(", line {line}")))]
    TemplateBeyond {
        /// Where the template comes from.
        origin: String,
        /// Line of the template, from 1, where it is known.
        line: Option<usize>,
        /// The bound.
        limit: TemplateLimit,
    },

    /// A chat template writes more than a prompt may hold.
    #[error("{origin}: the chat template writes more than {limit} bytes")]
    PromptTooLong {
        /// Where the template comes from.
        origin: String,
        /// The most bytes a rendering may have.
        limit: usize,
    },

    /// A system message for a template that leaves system messages out.
    #[error("{origin}: this chat template has no place for a system message")]
    SystemUnsupported {
        /// Where the template comes from.
        origin: String,
    },

    /// A template that leaves out what the assistant said: it cannot carry a conversation.
    #[error(
        "{origin}: the chat template leaves out the assistant's answers, so a second turn is impossible"
    )]
    AnswersDropped {
        /// Where the template comes from.
        origin: String,
    },

    /// The image tags of a prompt are not those of its pictures.
    #[error("{images} image(s): expected the prompt to hold {expected}, found {found}")]
    ImageTags {
        /// How many pictures there are.
        images: usize,
        /// The tags they need.
        expected: String,
        /// The tags that are there, each once.
        found: String,
    },

    /// An answer was recorded where no question waits for one.
    #[error("an answer was recorded, but no question is waiting for one")]
    NoQuestion,
}

/// A bound of chat templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateLimit {
    /// Of a tag, strings aside.
    #[error("a tag of more than {0} bytes, strings aside")]
    TagBytes(usize),
    /// Of a value, written out.
    #[error("a value of more than {0} bytes")]
    ValueBytes(usize),
    /// Of lists and maps within each other.
    #[error("lists and maps more than {0} deep within each other")]
    ValueDepth(usize),
    /// A namespace may hold no namespace, since it could come to hold itself.
    #[error("a namespace within another value: it may stand in a variable only")]
    NestedNamespace,
    /// Of a rendering.
    #[error("not rendered after {} seconds", .0.as_secs())]
    Time(Duration),
}
