//! The fields of a JSON file, each checked as it is read; whatever is wrong names file, field, expected and found.

use super::{ConfigError, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::Path;

/// The fields of one file.
pub(crate) struct Fields<'a> {
    pub(super) path: &'a Path,
    /// Where in the file, for messages: "" or "rope_scaling."
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a whole file.
    pub(crate) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self {
            path,
            prefix: "",
            map,
        }
    }

    pub(crate) fn value(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    pub(crate) fn wrong<T>(&self, field: &str, expected: impl Into<String>) -> Result<T> {
        let found = self.map.get(field).map_or("missing".into(), |v| {
            let text = v.to_string();
            if text.chars().count() > 80 {
                format!("{}…", text.chars().take(80).collect::<String>())
            } else {
                text
            }
        });
        let field = format!("{}{field}", self.prefix);
        Err(ConfigError::Field {
            path: self.path.to_owned(),
            field,
            expected: expected.into(),
            found,
        })
    }

    /// The fields of an object in the same file.
    pub(super) fn of<'b>(&self, prefix: &'static str, map: &'b Map<String, Value>) -> Fields<'b>
    where
        'a: 'b,
    {
        Fields {
            path: self.path,
            prefix,
            map,
        }
    }

    /// The fields of an object among these; `prefix` is its whole path, with a dot.
    pub(crate) fn object(&self, prefix: &'static str, field: &str) -> Result<Fields<'a>> {
        match self.value(field) {
            Some(Value::Object(map)) => Ok(self.of(prefix, map)),
            _ => self.wrong(field, "an object"),
        }
    }

    pub(crate) fn count(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        if self.value(field).is_none() {
            return Ok(None);
        }
        let value = self
            .value(field)
            .and_then(Value::as_u64)
            .and_then(|v| usize::try_from(v).ok());
        match value.filter(|v| range.contains(v)) {
            Some(value) => Ok(Some(value)),
            None => self.wrong(
                field,
                format!("an integer from {} to {}", range.start(), range.end()),
            ),
        }
    }

    pub(crate) fn required(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let missing = || ConfigError::Missing {
            path: self.path.to_owned(),
            field: format!("{}{field}", self.prefix),
        };
        self.count(field, range)?.ok_or_else(missing)
    }

    pub(crate) fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        if self.value(field).is_none() {
            return Ok(None);
        }
        match self
            .value(field)
            .and_then(Value::as_f64)
            .filter(|v| range.contains(v))
        {
            Some(value) => Ok(Some(value)),
            None => self.wrong(
                field,
                format!("a number from {} to {}", range.start(), range.end()),
            ),
        }
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => self.wrong(field, "true or false"),
        }
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => self.wrong(field, "a string"),
        }
    }

    /// A token id or a list of them.
    pub(super) fn ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        let ids = match self.value(field) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(v) => id(v).map(|id| vec![id]),
        };
        ids.map_or_else(
            || self.wrong(field, "a token id or a list of token ids"),
            Ok,
        )
    }

    /// A number from 0 to 1 for each of red, green and blue.
    pub(super) fn colours(&self, field: &str, default: [f32; 3], lowest: f64) -> Result<[f32; 3]> {
        if self.value(field).is_none() {
            return Ok(default);
        }
        let list = self.value(field).and_then(Value::as_array);
        let numbers: Option<Vec<f32>> = list.and_then(|list| {
            let number = |v: &Value| v.as_f64().filter(|v| (lowest..=1.0).contains(v));
            list.iter().map(|v| number(v).map(|v| v as f32)).collect()
        });
        match numbers.and_then(|numbers| numbers.try_into().ok()) {
            Some(colours) => Ok(colours),
            None => self.wrong(field, format!("three numbers from {lowest} to 1")),
        }
    }

    /// `len` positive finite numbers.
    pub(super) fn factors(&self, field: &str, len: usize) -> Result<Vec<f32>> {
        let list = self.value(field).and_then(Value::as_array);
        if let Some(list) = list.filter(|list| list.len() != len) {
            let found = list.len();
            return self.wrong(field, format!("{len} factors (head_dim / 2), not {found}"));
        }
        let factor = |v: &Value| {
            let factor = v.as_f64()? as f32;
            (factor.is_finite() && factor > 0.0).then_some(factor)
        };
        match list.and_then(|list| list.iter().map(factor).collect()) {
            Some(factors) => Ok(factors),
            None => self.wrong(field, format!("a list of {len} positive finite factors")),
        }
    }
}

pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Map<String, Value>> {
    let bad = |reason: String| ConfigError::Json {
        path: path.to_owned(),
        reason,
    };
    match serde_json::from_slice(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(bad("another JSON value".into())),
        Err(e) => Err(bad(e.to_string())),
    }
}
