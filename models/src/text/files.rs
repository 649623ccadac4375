//! The small files beside `tokenizer.json`, read once and checked.

use std::io::ErrorKind;
use std::path::Path;

use phidias_engine::files::read_at_most;
use serde_json::{Map, Value};

use super::error::TextError;

/// Most bytes read of `tokenizer.json`; Phi's is 1.9 MB, the largest in use about 35 MB.
pub(super) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Most bytes read of a `.tiktoken` file; cl100k_base's is 1.7 MB.
pub(super) const MAX_TIKTOKEN_BYTES: u64 = 16 << 20;
/// Most bytes read of `tokenizer_config.json` and `chat_template.*`.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The bytes of a file, or `None` when there is no such file.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    match read_at_most(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => Ok(None),
            ErrorKind::FileTooLarge => Err(TextError::FileTooLarge {
                path: path.to_owned(),
                limit,
            }),
            _ => Err(TextError::Read {
                path: path.to_owned(),
                source: error,
            }),
        },
    }
}

/// The text of a file, or `None` when there is no such file.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(path, limit)? else {
        return Ok(None);
    };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| TextError::NotUtf8 {
            path: path.to_owned(),
            offset: error.utf8_error().valid_up_to(),
        })
}

/// What is used of a `tokenizer_config.json` (or of a `chat_template.json`, which has the last
/// field only). A field that is absent or null is `None`.
#[derive(Default)]
pub(super) struct TokenizerConfig {
    pub add_bos_token: Option<bool>,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the file, or gives the empty config when there is no such file.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        match read(path, MAX_CONFIG_BYTES)? {
            Some(bytes) => Self::parse(&bytes, &path.display().to_string()),
            None => Ok(Self::default()),
        }
    }

    pub fn parse(bytes: &[u8], origin: &str) -> Result<Self, TextError> {
        let object: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| TextError::Json {
                origin: origin.into(),
                reason: error.to_string(),
            })?;
        let object = Object { object, origin };
        Ok(Self {
            add_bos_token: object.flag("add_bos_token")?,
            bos_token: object.token("bos_token")?,
            eos_token: object.token("eos_token")?,
            chat_template: object.template("chat_template")?,
        })
    }
}

struct Object<'a> {
    object: Map<String, Value>,
    origin: &'a str,
}

impl Object<'_> {
    fn get(&self, field: &str) -> &Value {
        self.object.get(field).unwrap_or(&Value::Null)
    }

    fn wrong(&self, field: &'static str, expected: &'static str) -> TextError {
        let mut found = self.get(field).to_string();
        if let Some((cut, _)) = found.char_indices().nth(60) {
            found.truncate(cut);
            found.push_str(" ...");
        }
        TextError::Field {
            origin: self.origin.into(),
            field,
            expected,
            found,
        }
    }

    fn flag(&self, field: &'static str) -> Result<Option<bool>, TextError> {
        match self.get(field) {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            _ => Err(self.wrong(field, "true or false")),
        }
    }

    /// A token is written as a string, or as an object whose `content` is that string.
    fn token(&self, field: &'static str) -> Result<Option<String>, TextError> {
        let value = match self.get(field) {
            Value::Null => return Ok(None),
            Value::Object(token) => token.get("content").unwrap_or(&Value::Null),
            value => value,
        };
        match value {
            Value::String(token) => Ok(Some(token.clone())),
            _ => Err(self.wrong(field, "a string, or an object with a string `content`")),
        }
    }

    /// A template is a string, or a list of `{name, template}` of which `default` is taken.
    fn template(&self, field: &'static str) -> Result<Option<String>, TextError> {
        let list = match self.get(field) {
            Value::Null => return Ok(None),
            Value::String(template) => return Ok(Some(template.clone())),
            Value::Array(list) => list,
            _ => return Err(self.wrong(field, "a string or a list of named templates")),
        };
        let named: Option<Vec<(&str, &str)>> = list
            .iter()
            .map(|entry| {
                Some((
                    entry.get("name")?.as_str()?,
                    entry.get("template")?.as_str()?,
                ))
            })
            .collect();
        let named =
            named.ok_or_else(|| self.wrong(field, "entries with a `name` and a `template`"))?;
        match named.iter().find(|(name, _)| *name == "default") {
            Some((_, template)) => Ok(Some(template.to_string())),
            None => Err(TextError::NoDefaultTemplate {
                origin: self.origin.into(),
                found: named.iter().map(|(name, _)| name.to_string()).collect(),
            }),
        }
    }
}
