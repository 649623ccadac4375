//! Chat templates: messages to the text of a prompt.
//!
//! A model's folder brings its template, a small Jinja program, and it is run the way the
//! reference runs it: `trim_blocks` and `lstrip_blocks` on, nothing escaped, Python's string
//! methods, `raise_exception`, and the variables `messages`, `add_generation_prompt`, `bos_token`
//! and `eos_token`. It is somebody else's program, so it can read nothing but those variables,
//! and its work, memory, depth, output and time are bounded.

use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, State};
use serde::{Deserialize, Serialize};

use super::bounds::{self, Beyond};
use super::error::{TemplateLimit, TextError};
use super::files::{self, TokenizerConfig};
use super::tiktoken;
use super::tokenizer::{Bos, MAX_TEXT_BYTES, Tokenizer};

/// Longest template accepted; published ones have up to about twenty thousand bytes.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;
/// Stack for compiling, for each byte of a template: a chain such as `x.a.a.a` or `---1` is as deep as it is
/// long, and the compiler walks it by recursion without a bound of its own. Measured: 300 to 400 bytes.
const STACK_PER_BYTE: usize = 1 << 10;
const STACK_AT_LEAST: usize = 1 << 20;
/// Work one rendering may do: one unit per instruction and per 64 bytes made, so that it bounds
/// memory too. A message costs about thirty units and its own length.
const FUEL: u64 = 4_000_000;
/// Longest time of one rendering. What was measured takes milliseconds; this is for what no other bound holds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stack for rendering: calls as deep as may be, and values as deep as may be built in them without
/// being measured.
const RENDER_STACK: usize = 64 << 20;
/// Depth of calls and nested loops in one rendering.
const MAX_DEPTH: usize = 100;
/// Longest rendering: what can be encoded.
const MAX_PROMPT_BYTES: usize = MAX_TEXT_BYTES;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// One message of a conversation.
///
/// Its text goes into the prompt as it is: when it spells a special token such as `<|end|>`, the
/// tokenizer reads that token, as it does in the reference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self {
            role: Role::System,
            content: content.into(),
        }
    }

    /// A user's message.
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: Role::User,
            content: content.into(),
        }
    }

    /// An assistant's message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self {
            role: Role::Assistant,
            content: content.into(),
        }
    }
}

/// Whether the rendering ends by opening the assistant's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// Open it: the model is to answer.
    Add,
    /// Do not.
    Omit,
}

/// The templates published with the family, for folders that bring none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// Phi-3-mini as first published: writes BOS, leaves system messages out.
    Phi3Mini,
    /// Phi-3-medium as first published: leaves system messages out.
    Phi3Medium,
    /// Phi-3-small.
    Phi3Small,
    /// Phi-3-vision and Phi-3.5-vision.
    Phi3Vision,
    /// Phi-3.5-mini.
    Phi35Mini,
}

impl Builtin {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Phi3Mini,
        Self::Phi3Medium,
        Self::Phi3Small,
        Self::Phi3Vision,
        Self::Phi35Mini,
    ];

    /// The one for a folder that brings no template: Phi-3-small's where `<|endoftext|>` begins a
    /// sequence, as only its tokenizer has it; or else Phi-3.5-mini's, which has a place for
    /// everything and writes no BOS.
    #[must_use]
    pub fn fitting(tokenizer: &Tokenizer) -> Self {
        let (bos, _) = Self::Phi3Small.bos_and_eos();
        match tokenizer.id_of(bos) {
            Some(id) if tokenizer.bos_id() == Some(id) => Self::Phi3Small,
            _ => Self::Phi35Mini,
        }
    }

    /// The template's text.
    #[must_use]
    pub fn source(self) -> &'static str {
        match self {
            Self::Phi3Mini => include_str!("templates/phi3_mini.jinja"),
            Self::Phi3Medium => include_str!("templates/phi3_medium.jinja"),
            Self::Phi3Small => include_str!("templates/phi3_small.jinja"),
            Self::Phi3Vision => include_str!("templates/phi3_vision.jinja"),
            Self::Phi35Mini => include_str!("templates/phi35_mini.jinja"),
        }
    }

    fn origin(self) -> String {
        format!("built-in template {self:?}")
    }

    fn bos_and_eos(self) -> (&'static str, &'static str) {
        match self {
            Self::Phi3Small => (tiktoken::END_OF_TEXT, tiktoken::END_OF_TEXT),
            _ => ("<s>", "<|endoftext|>"),
        }
    }
}

/// A compiled chat template.
///
/// ```
/// use phidias_models::text::{Builtin, ChatTemplate, GenerationPrompt, Message};
///
/// let template = ChatTemplate::builtin(Builtin::Phi35Mini)?;
/// let prompt = template.render(&[Message::user("Hi")], GenerationPrompt::Add)?;
/// assert_eq!(prompt, "<|user|>\nHi<|end|>\n<|assistant|>\n");
/// # Ok::<(), phidias_models::text::TextError>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    origin: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template can see.
#[derive(Serialize)]
struct Variables<'a> {
    messages: &'a [Message],
    add_generation_prompt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    bos_token: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eos_token: Option<&'a str>,
}

/// The one template of an environment.
const TEMPLATE: &str = "chat template";

impl ChatTemplate {
    /// The template of a model's folder: `chat_template.jinja`, or else `chat_template` of
    /// `tokenizer_config.json` (a string, or the one named `default` of a list), or else
    /// `chat_template.json`; where there is none, the built-in `fallback`.
    ///
    /// # Errors
    /// [`TextError`]: a file cannot be read, is malformed, or is not a valid template.
    pub fn open(dir: &Path, fallback: Builtin) -> Result<Self, TextError> {
        let config_path = dir.join("tokenizer_config.json");
        let mut config = TokenizerConfig::open(&config_path)?;
        let jinja_path = dir.join("chat_template.jinja");
        let json_path = dir.join("chat_template.json");

        let (path, source) =
            if let Some(source) = files::read_text(&jinja_path, files::MAX_CONFIG_BYTES)? {
                (jinja_path, Some(source))
            } else if let Some(source) = config.chat_template.take() {
                (config_path, Some(source))
            } else {
                let source = TokenizerConfig::open(&json_path)?.chat_template;
                (json_path, source)
            };
        Self::with_config(source, &path.display().to_string(), config, fallback)
    }

    /// The same from the contents of a `tokenizer_config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_config(
        tokenizer_config_json: &[u8],
        origin: &str,
        fallback: Builtin,
    ) -> Result<Self, TextError> {
        let mut config = TokenizerConfig::parse(tokenizer_config_json, origin)?;
        Self::with_config(config.chat_template.take(), origin, config, fallback)
    }

    fn with_config(
        source: Option<String>,
        origin: &str,
        config: TokenizerConfig,
        fallback: Builtin,
    ) -> Result<Self, TextError> {
        let (bos, eos) = (config.bos_token, config.eos_token);
        if let Some(source) = source {
            return Self::new(source, origin, bos, eos);
        }
        let (builtin_bos, builtin_eos) = fallback.bos_and_eos();
        Self::new(
            fallback.source().into(),
            &fallback.origin(),
            Some(bos.unwrap_or_else(|| builtin_bos.into())),
            Some(eos.unwrap_or_else(|| builtin_eos.into())),
        )
    }

    /// A built-in template with the tokens of the model it was published with.
    ///
    /// # Errors
    /// None in practice: the templates are part of the program, and tested.
    pub fn builtin(builtin: Builtin) -> Result<Self, TextError> {
        Self::with_config(None, "", TokenizerConfig::default(), builtin)
    }

    /// A template from its source. `origin` names it in errors; `bos_token` and `eos_token` are
    /// the variables of that name, undefined (and written as nothing) when absent.
    ///
    /// # Errors
    /// [`TextError::TemplateTooLong`], [`TextError::TemplateSyntax`].
    pub fn new(
        source: String,
        origin: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TextError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TextError::TemplateTooLong {
                origin: origin.into(),
                bytes: source.len(),
                limit: MAX_TEMPLATE_BYTES,
            });
        }
        let syntax_error = |error: minijinja::Error| TextError::TemplateSyntax {
            origin: origin.into(),
            line: error.line().unwrap_or(0),
            reason: reason(&error),
        };
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(syntax_error)?;

        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(method);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        environment.add_filter(bounds::FILTER, bounds::measured);
        environment.add_filter(bounds::FIELD_FILTER, bounds::measured_field);
        environment.set_formatter(|out, state, value| {
            bounds::measure(state, value)?;
            minijinja::escape_formatter(out, state, value)
        });
        let source =
            bounds::prepared(&source).map_err(|(line, limit)| TextError::TemplateBeyond {
                origin: origin.into(),
                line: Some(line),
                limit,
            })?;
        let stack = STACK_AT_LEAST + source.len() * STACK_PER_BYTE;
        compile(&mut environment, source, stack)
            .map_err(|error| TextError::TemplateFailed {
                origin: origin.into(),
                line: 0,
                reason: format!("no thread with a stack of {stack} bytes to compile it: {error}"),
            })?
            .map_err(syntax_error)?;
        Ok(Self {
            environment: Arc::new(environment),
            origin: origin.into(),
            bos_token,
            eos_token,
        })
    }

    /// Where the template comes from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] when the template refuses the messages;
    /// [`TextError::TemplateFailed`]; [`TextError::TemplateOutOfFuel`], [`TextError::TemplateBeyond`] and
    /// [`TextError::PromptTooLong`] when it goes beyond its bounds. After the longest time a thread is left
    /// behind, since nothing can stop it: it works until it meets another bound.
    pub fn render(
        &self,
        messages: &[Message],
        prompt: GenerationPrompt,
    ) -> Result<String, TextError> {
        self.render_within(messages, prompt, PATIENCE)
    }

    fn render_within(
        &self,
        messages: &[Message],
        prompt: GenerationPrompt,
        patience: Duration,
    ) -> Result<String, TextError> {
        let variables = Value::from(Serde(Variables {
            messages,
            add_generation_prompt: prompt == GenerationPrompt::Add,
            bos_token: self.bos_token.as_deref(),
            eos_token: self.eos_token.as_deref(),
        }));
        let environment = Arc::clone(&self.environment);
        let (sender, receiver) = mpsc::sync_channel(1);
        let rendering = std::thread::Builder::new()
            .stack_size(RENDER_STACK)
            .spawn(move || {
                let mut output = Bounded {
                    bytes: Vec::new(),
                    full: false,
                };
                let rendered = environment
                    .get_template(TEMPLATE)
                    .and_then(|template| template.render_captured_to(variables, &mut output))
                    .map(drop);
                // Nobody listens any more when it took too long.
                let _ = sender.send((output, rendered));
            })
            .map_err(|error| TextError::TemplateFailed {
                origin: self.origin.clone(),
                line: 0,
                reason: format!(
                    "no thread with a stack of {RENDER_STACK} bytes to render it: {error}"
                ),
            })?;
        let (output, rendered) = match receiver.recv_timeout(patience) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                return Err(self.beyond(None, TemplateLimit::Time(patience)));
            }
            Err(RecvTimeoutError::Disconnected) => match rendering.join() {
                Ok(()) => unreachable!("it sends before it ends"),
                Err(panic) => resume_unwind(panic),
            },
        };
        if output.full {
            return Err(TextError::PromptTooLong {
                origin: self.origin.clone(),
                limit: MAX_PROMPT_BYTES,
            });
        }
        rendered.map_err(|error| self.failed(error))?;
        String::from_utf8(output.bytes).map_err(|_| TextError::TemplateFailed {
            origin: self.origin.clone(),
            line: 0,
            reason: "it wrote invalid UTF-8".into(),
        })
    }

    /// Whether the template has a place for a system message. Some leave it out in silence.
    pub fn supports_system(&self) -> bool {
        let mark = unused_mark(&[]);
        let messages = [Message::system(&mark), Message::user("?")];
        self.render(&messages, GenerationPrompt::Add)
            .is_ok_and(|text| text.contains(&mark))
    }

    /// The token with which the template ends the assistant's turn: generation stops at it, beside
    /// the stop tokens of the configs. Empty when the turn does not end with a special token.
    ///
    /// # Errors
    /// As [`render`](Self::render) and [`Tokenizer::encode`].
    pub fn stop_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let Some(rest) = self.after_answer(&[Message::user("?")], None)? else {
            return Ok(Vec::new());
        };
        let first = tokenizer.encode(&rest, Bos::Omit)?.first().copied();
        Ok(first
            .filter(|&id| tokenizer.is_special(id))
            .into_iter()
            .collect())
    }

    /// What the template writes after the answer to `messages`: the end of the assistant's turn,
    /// and with a `question` the next turn and the opening of its answer. `None`: the template
    /// leaves answers out.
    pub(super) fn after_answer(
        &self,
        messages: &[Message],
        question: Option<&Message>,
    ) -> Result<Option<String>, TextError> {
        let mut messages: Vec<Message> = messages.to_vec();
        messages.extend(question.cloned());
        let mark = unused_mark(&messages);
        let place = messages.len() - question.iter().len();
        messages.insert(place, Message::assistant(&mark));
        let prompt = if question.is_some() {
            GenerationPrompt::Add
        } else {
            GenerationPrompt::Omit
        };
        let text = self.render(&messages, prompt)?;
        Ok(text.rsplit_once(&mark).map(|(_, rest)| rest.to_owned()))
    }

    fn failed(&self, error: minijinja::Error) -> TextError {
        let origin = self.origin.clone();
        let line = error.line().unwrap_or(0);
        let mut causes =
            std::iter::successors(Some(&error as &(dyn std::error::Error + 'static)), |e| {
                e.source()
            });
        if let Some(Raised(message)) = causes.clone().find_map(|e| e.downcast_ref()) {
            return TextError::TemplateRaised {
                origin,
                message: message.clone(),
            };
        }
        if let Some(&Beyond(limit)) = causes.find_map(|e| e.downcast_ref()) {
            return self.beyond(error.line(), limit);
        }
        if error.kind() == ErrorKind::OutOfFuel {
            return TextError::TemplateOutOfFuel { origin, fuel: FUEL };
        }
        TextError::TemplateFailed {
            origin,
            line,
            reason: reason(&error),
        }
    }

    fn beyond(&self, line: Option<usize>, limit: TemplateLimit) -> TextError {
        TextError::TemplateBeyond {
            origin: self.origin.clone(),
            line,
            limit,
        }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// The message of `raise_exception`, to tell a refusal from a failure.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(
        minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
            .with_source(Raised(message)),
    )
}

/// Python's methods of strings, lists and maps. Some write out what they are given.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, minijinja::Error> {
    for argument in arguments {
        bounds::measure(state, argument)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// `tojson` as the reference has it: Python's `json.dumps`, letters as they are, no HTML escapes.
fn tojson(state: &State, value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    bounds::measure(state, &value)?;
    let indent: Option<usize> = options.get("indent")?;
    let json = match indent {
        Some(width) if width <= 16 => {
            let spaces = " ".repeat(width);
            let style = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            dump(&value, style)
        }
        Some(width) => Err(format!("indent of {width}")),
        None => dump(&value, OneLine),
    };
    json.map_err(|reason| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {reason}"))
    })
}

fn dump(value: &Value, style: impl serde_json::ser::Formatter) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, style);
    value
        .serialize(&mut serializer)
        .map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| error.to_string())
}

/// Python's default separators: `{"a": 1, "b": [2, 3]}`.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// Adds the one template, compiled on a stack of so many bytes. The outer error: there is no such thread.
fn compile(
    environment: &mut Environment<'static>,
    source: String,
    stack: usize,
) -> io::Result<Result<(), minijinja::Error>> {
    std::thread::scope(|scope| {
        let compiling = std::thread::Builder::new()
            .stack_size(stack)
            .spawn_scoped(scope, || environment.add_template_owned(TEMPLATE, source))?;
        Ok(compiling
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Output that refuses to grow beyond [`MAX_PROMPT_BYTES`].
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_PROMPT_BYTES {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What went wrong, in the library's words without its place marks.
fn reason(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// A string to find a place in a rendering by: no template changes its letters (they have no case
/// and are no white space), and no message contains it.
fn unused_mark(messages: &[Message]) -> String {
    let mut mark = String::from("\u{E000}0\u{E001}");
    while messages
        .iter()
        .any(|message| message.content.contains(&mark))
    {
        mark.insert(mark.len() - '\u{E001}'.len_utf8(), '0');
    }
    mark
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture::{mini, vision};

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), "here", Some("<s>".into()), None).unwrap()
    }

    fn render(source: &str) -> Result<String, TextError> {
        template(source).render(&[Message::user("Hi")], GenerationPrompt::Add)
    }

    #[test]
    fn jinja_as_the_reference_has_it() {
        for (source, expected) in [
            ("{{ bos_token }}{{ eos_token }}|{{ nothing }}", "<s>|"),
            ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
            ("{% if add_generation_prompt %}<&>{% endif %}", "<&>"),
            ("{{ messages[0]['content'].upper().strip('H') }}", "I"),
            ("{{ messages[-1].role ~ messages | length }}", "user1"),
            (
                "{% set n = namespace(i=1) %}{% for m in messages[1:] %}{% endfor %}{{ n.i }}",
                "1",
            ),
            (
                "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                "1",
            ),
            (
                "{{ {'a': [1, '<é\"'], 'b': none} | tojson }}",
                r#"{"a": [1, "<é\""], "b": null}"#,
            ),
            (
                "{{ {'a': [1]} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1\n  ]\n}",
            ),
            (
                "{{ messages | tojson }}",
                r#"[{"role": "user", "content": "Hi"}]"#,
            ),
            ("{{ messages[0].get('name', 'none') }}", "none"),
        ] {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn syntax_errors_name_the_line() {
        let error = ChatTemplate::new("a\n{% for %}".into(), "here", None, None).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateSyntax { line: 2, .. }),
            "{error}"
        );
        let deep = "(".repeat(bounds::MAX_TAG_BYTES / 2);
        let error = ChatTemplate::new(format!("{{{{ {deep}"), "here", None, None).unwrap_err();
        assert!(matches!(error, TextError::TemplateSyntax { .. }), "{error}");
        let long = " ".repeat(MAX_TEMPLATE_BYTES + 1);
        let error = ChatTemplate::new(long, "here", None, None).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateTooLong { .. }),
            "{error}"
        );
    }

    /// Each chain as long as a template can be. It compiles or is refused; on a smaller stack it aborts.
    #[test]
    fn chains_are_compiled_at_any_length() {
        for (begin, link, end) in [
            ("{{ ", "-", "1 }}"),
            ("{{ ", "not ", "1 }}"),
            ("{{ ", "1+", "1 }}"),
            ("{{ ", "1~", "1 }}"),
            ("{{ ", "1234567890~", " }}"),
            ("{{ ", "[1]+", " }}"),
            ("{{ ", "1<", "1 }}"),
            ("{{ ", "1 or ", "1 }}"),
            ("{{ ", "1 if 1 else ", "1 }}"),
            ("{{ x", ".a", " }}"),
            ("{{ x", "[0]", " }}"),
            ("{{ x", "()", " }}"),
            ("{{ x", "|e", " }}"),
            ("{{ x is", " a is", " a }}"),
            ("{{ ", "(", " }}"),
            ("{% if 1 %}", "{%elif 1%}", "{% endif %}"),
            ("", "{%if 1%}", ""),
        ] {
            let links = (MAX_TEMPLATE_BYTES - begin.len() - end.len()) / link.len();
            let source = format!("{begin}{}{end}", link.repeat(links));
            match ChatTemplate::new(source, "here", None, None) {
                Ok(_) | Err(TextError::TemplateSyntax { .. }) => {}
                Err(TextError::TemplateBeyond {
                    line: Some(1),
                    limit,
                    ..
                }) if limit == TemplateLimit::TagBytes(bounds::MAX_TAG_BYTES) => {}
                Err(error) => panic!("{begin}{link}{link}{end}: {error}"),
            }
            // As long as a tag can be, as often as it fits into a template.
            if begin == "{{ " && end.ends_with(" }}") && link != "(" {
                let links = (bounds::MAX_TAG_BYTES - 4) / link.len();
                let tag = format!("{begin}{}{end}", link.repeat(links));
                let source = tag.repeat(MAX_TEMPLATE_BYTES / tag.len());
                assert!(bounds::longest_tag(&source) > bounds::MAX_TAG_BYTES / 2);
                match ChatTemplate::new(source, "here", None, None) {
                    Ok(_) | Err(TextError::TemplateSyntax { .. }) => {}
                    Err(error) => panic!("{tag}: {error}"),
                }
            }
        }
    }

    #[test]
    fn a_template_may_refuse() {
        let source = "{% macro no(x) %}{{ raise_exception(x) }}{% endmacro %}{{ no('not so') }}";
        let error = render(source).unwrap_err();
        assert!(matches!(&error, TextError::TemplateRaised { message, .. } if message == "not so"));
    }

    #[test]
    fn failures_name_the_line() {
        for source in [
            "\n{{ nothing.at.all }}",
            "\n{{ unknown() }}",
            "\n{{ 1 | nofilter }}",
            "\n{{ 1 / 0 }}",
            "\n{{ 'a'.nomethod() }}",
            "\n{{ 1 | tojson(indent=99) }}",
            "\n{% include 'other' %}",
        ] {
            let error = render(source).unwrap_err();
            assert!(
                matches!(error, TextError::TemplateFailed { line: 2, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn work_depth_and_output_are_bounded() {
        let forever =
            "{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}";
        let error = render(forever).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateOutOfFuel { .. }),
            "{error}"
        );
        let deep = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(matches!(
            render(deep),
            Err(TextError::TemplateFailed { .. })
        ));
        let long = "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}";
        assert!(matches!(render(long), Err(TextError::PromptTooLong { .. })));
    }

    fn beyond(source: &str) -> (usize, TemplateLimit) {
        match render(source) {
            Err(TextError::TemplateBeyond { line, limit, .. }) => (line.unwrap(), limit),
            other => panic!("{source}: {other:?}"),
        }
    }

    /// Each in a loop, and each aborted the process or took gigabytes or minutes.
    #[test]
    fn values_that_grow_are_bounded() {
        let bytes = TemplateLimit::ValueBytes(bounds::MAX_VALUE_BYTES);
        let depth = TemplateLimit::ValueDepth(bounds::MAX_VALUE_DEPTH);
        for (growth, limit) in [
            ("n.x ~ n.x", bytes),
            ("[n.x, n.x]", bytes),
            ("{'a': n.x, 'b': n.x}", bytes),
            ("[n.x] * 2", bytes),
            ("[n.x, n.x] | reverse", bytes),
            ("{'a': n.x, 'b': n.x}.values()", bytes),
            ("[n.x]", depth),
            ("{'a': n.x}", depth),
            ("(n.x,)", depth),
            ("n.x, ", depth),
            ("[[n.x]] | first", depth),
            ("namespace(x=n.x)", TemplateLimit::NestedNamespace),
            ("n", TemplateLimit::NestedNamespace),
            ("[n]", TemplateLimit::NestedNamespace),
            ("{'a': n}.items()", TemplateLimit::NestedNamespace),
            ("[n] + [n]", TemplateLimit::NestedNamespace),
        ] {
            let source = format!(
                "{{% set n = namespace(x='ab') %}}\n{{% for i in range(9999) %}}\n\
                 {{%- set n.x = {growth} -%}}\n{{% endfor %}}"
            );
            assert_eq!(beyond(&source), (3, limit), "{growth}");
        }
        // Unrolled, so that nothing is carried by a namespace.
        let unrolled = |set: &str| format!("{{% set x = 'ab' %}}{}", set.repeat(999));
        assert_eq!(beyond(&unrolled("{% set x = [x, x] %}")).1, bytes);
        assert_eq!(beyond(&unrolled("{% set x, y = [x], 1 %}")).1, depth);
    }

    /// Values that no variable holds, as large as one expression makes them.
    #[test]
    fn what_is_written_is_bounded() {
        let bytes = TemplateLimit::ValueBytes(bounds::MAX_VALUE_BYTES);
        let large = "[[['a'] * 999] * 999] * 999";
        for use_of_it in ["", " | tojson", " | tojson(indent=2)"] {
            let source = format!("{{{{ ({large}){use_of_it} }}}}");
            assert_eq!(beyond(&source), (1, bytes), "{source}");
        }
        assert_eq!(beyond(&format!("{{{{ '-'.join({large}) }}}}")).1, bytes);
    }

    #[test]
    fn what_nothing_else_bounds_is_given_up() {
        let nested = |name: &str| {
            let each = |i| format!("{{% for {name}{} in [[{name}{i}, {name}{i}]] %}}", i + 1);
            (0..22).map(each).collect::<String>()
        };
        let source = format!(
            "{{% set a0 = 1 %}}{{% set b0 = 1 %}}{}{}{{{{ a22 == b22 }}}}{}",
            nested("a"),
            nested("b"),
            "{% endfor %}".repeat(44),
        );
        let patience = Duration::ZERO;
        let error = template(&source)
            .render_within(&[], GenerationPrompt::Omit, patience)
            .unwrap_err();
        assert!(
            matches!(error, TextError::TemplateBeyond { limit: TemplateLimit::Time(limit), .. } if limit == patience),
            "{error}"
        );
    }

    /// As deep as calls and brackets go together, compared and joined: the stack has to hold it.
    #[test]
    fn values_within_an_expression_fit_on_the_stack() {
        let (open, close) = ("[".repeat(40), "]".repeat(40));
        let source = format!(
            "{{% macro m(x, n) %}}{{% if n %}}{{{{ m({open}x{close}, n - 1) }}}}\
             {{% else %}}{{{{ (x ~ '') | length }}}}{{{{ x == [x] }}}}{{% endif %}}{{% endmacro %}}\
             {{{{ m(1, DEPTH) }}}}"
        );
        let depths = (1..MAX_DEPTH).rev();
        let mut rendered = depths.map(|n| render(&source.replace("DEPTH", &n.to_string())));
        let deepest = rendered
            .find_map(Result::ok)
            .expect("one that is not too deep");
        let length: String = deepest.chars().take_while(char::is_ascii_digit).collect();
        let brackets = length.parse::<usize>().unwrap() / 2;
        assert!(brackets > 500, "{deepest}");
    }

    /// Published templates, in a conversation that fills the longest context, use a tenth of each bound.
    #[test]
    fn the_bounds_leave_room() {
        let turn = [
            Message::user("word ".repeat(100)),
            Message::assistant("word ".repeat(100)),
        ];
        let messages: Vec<Message> = turn.into_iter().cycle().take(1280).collect();
        for builtin in Builtin::ALL {
            let source = builtin.source();
            assert!(source.len() <= MAX_TEMPLATE_BYTES / 10);
            assert!(bounds::longest_tag(source) <= bounds::MAX_TAG_BYTES / 10);
            let mut template = ChatTemplate::builtin(builtin).unwrap();
            let environment = Arc::get_mut(&mut template.environment).unwrap();
            environment.set_fuel(Some(FUEL / 10));
            environment.set_recursion_limit(MAX_DEPTH / 10);
            let text = template.render(&messages, GenerationPrompt::Add).unwrap();
            assert!(text.len() <= MAX_PROMPT_BYTES / 10);
        }
    }

    #[test]
    fn stop_tokens_are_found_not_known() {
        for builtin in [Builtin::Phi3Mini, Builtin::Phi3Vision, Builtin::Phi35Mini] {
            let template = ChatTemplate::builtin(builtin).unwrap();
            assert_eq!(
                template.stop_tokens(&mini()).unwrap(),
                [32007],
                "{builtin:?}"
            );
            assert_eq!(
                template.stop_tokens(&vision()).unwrap(),
                [32007],
                "{builtin:?}"
            );
        }
        let stops = |source| template(source).stop_tokens(&mini()).unwrap();
        let each = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}";
        assert_eq!(stops(each), [32000]);
        assert_eq!(
            stops("{% for m in messages %}{{ m.content }}\n{% endfor %}"),
            [0u32; 0]
        );
        assert_eq!(stops("nothing"), [0u32; 0]);
    }

    #[test]
    fn system_messages_are_not_lost_in_silence() {
        let supports = |builtin| ChatTemplate::builtin(builtin).unwrap().supports_system();
        assert_eq!(Builtin::ALL.map(supports), [false, false, true, true, true]);
        let refusing =
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}";
        assert!(!template(refusing).supports_system());
    }

    #[test]
    fn marks_are_unused() {
        let taken = [Message::user(unused_mark(&[]))];
        assert_ne!(unused_mark(&taken), taken[0].content);
        assert!(!taken[0].content.contains(&unused_mark(&taken)));
    }

    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let text = || {
            let template = ChatTemplate::open(dir.path(), Builtin::Phi3Mini)?;
            template.render(&[Message::user("Hi")], GenerationPrompt::Omit)
        };
        assert_eq!(text().unwrap(), "<s><|user|>\nHi<|end|>\n<|assistant|>\n");
        std::fs::write(path("tokenizer_config.json"), r#"{"bos_token": "[B]"}"#).unwrap();
        assert_eq!(text().unwrap(), "[B]<|user|>\nHi<|end|>\n<|assistant|>\n");
        std::fs::write(
            path("chat_template.json"),
            r#"{"chat_template": "json {{ bos_token }}"}"#,
        )
        .unwrap();
        assert_eq!(text().unwrap(), "json [B]");
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "tool"},
                                         {"name": "default", "template": "list"}]}"#;
        std::fs::write(path("tokenizer_config.json"), list).unwrap();
        assert_eq!(text().unwrap(), "list");
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "tool"}]}"#;
        std::fs::write(path("tokenizer_config.json"), list).unwrap();
        assert!(
            matches!(text(), Err(TextError::NoDefaultTemplate { found, .. }) if found == ["tool_use"])
        );
        std::fs::remove_file(path("tokenizer_config.json")).unwrap();
        std::fs::write(path("chat_template.jinja"), "jinja\n").unwrap();
        assert_eq!(text().unwrap(), "jinja");
        std::fs::write(path("chat_template.jinja"), b"ab\xff").unwrap();
        assert!(matches!(text(), Err(TextError::NotUtf8 { offset: 2, .. })));
        std::fs::write(path("chat_template.jinja"), "x".repeat(17 << 20)).unwrap();
        assert!(matches!(text(), Err(TextError::FileTooLarge { .. })));
        std::fs::write(path("chat_template.jinja"), "{{").unwrap();
        let error = text().unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
    }
}
