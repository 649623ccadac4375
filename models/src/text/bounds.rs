//! What the template library leaves without a bound.
//!
//! It counts instructions and the bytes they make, which bounds neither of three things:
//!
//! 1. **Compiling.** A chain of constants such as `1~1~1` is folded anew from its beginning for each of its
//!    links: square in the length of a tag. So a tag has a limit, strings aside ([`prepared`]).
//! 2. **Values that hold one value twice.** `[x, x]` costs two slots, and after sixty rounds of it is written
//!    in 2^60 bytes; a list around a list around a list is dropped by a recursion as deep; a namespace that
//!    holds itself has no end at all. What grows so is carried by `{% set %}`: its values are measured, each
//!    as large as it would be written ([`measured`]).
//! 3. **Time.** What is left, such as a comparison of two such values that were built within one expression,
//!    is given up after a while (see [`ChatTemplate::render`](super::ChatTemplate::render)).

use std::ops::Range;

use minijinja::value::{Value, ValueKind};
use minijinja::{ErrorKind, State};

use super::error::TemplateLimit;
use super::tokenizer::MAX_TEXT_BYTES;

/// Most bytes of a tag, strings aside. Those of the published templates have at most 66.
pub(super) const MAX_TAG_BYTES: usize = 2 << 10;
/// Most bytes of a value, written out: a text as long as any, and as much again for what is made of it.
pub(super) const MAX_VALUE_BYTES: usize = 2 * MAX_TEXT_BYTES;
/// Most lists and maps within each other. The messages are a list of maps.
pub(super) const MAX_VALUE_DEPTH: usize = 64;
/// What an element counts, whatever it is: its place in a list.
const ELEMENT_BYTES: usize = size_of::<Value>();
/// Elements measured for one unit of work.
const ELEMENTS_PER_FUEL: u64 = 4;

/// The filters that [`prepared`] puts around the values of `{% set name = … %}` and `{% set name.field = … %}`.
pub(super) const FILTER: &str = "__measured";
pub(super) const FIELD_FILTER: &str = "__measured_field";

/// A tag of a template: `{{ … }}` or `{% … %}`.
struct Tag {
    /// Between its marks.
    inner: Range<usize>,
    /// Bytes in there, strings counted as their quotes.
    code_bytes: usize,
}

/// The source with the values of all `{% set name = value %}` measured.
///
/// # Errors
/// A tag that is too long, and its line.
pub(super) fn prepared(source: &str) -> Result<String, (usize, TemplateLimit)> {
    let mut prepared = String::with_capacity(source.len());
    let mut copied = 0;
    for Tag { inner, code_bytes } in tags(source) {
        if code_bytes > MAX_TAG_BYTES {
            let line = 1 + source[..inner.start].matches('\n').count();
            return Err((line, TemplateLimit::TagBytes(MAX_TAG_BYTES)));
        }
        if let Some(value) = value_of_set(&source[inner.clone()]) {
            let value = inner.start + value..inner.end;
            prepared.push_str(&source[copied..value.start]);
            prepared.push('(');
            prepared.push_str(&source[value.clone()]);
            prepared.push_str(")|");
            let target = &source[inner.start..value.start];
            prepared.push_str(if target.contains('.') {
                FIELD_FILTER
            } else {
                FILTER
            });
            copied = value.end;
        }
    }
    prepared.push_str(&source[copied..]);
    Ok(prepared)
}

/// Where the value begins in `set name = value`; `None` for any other tag, `{% set name %}` with a body too:
/// that makes a string, and those are counted.
fn value_of_set(inner: &str) -> Option<usize> {
    let target = inner.trim_start().strip_prefix("set")?;
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    if target.starts_with(is_name) {
        return None;
    }
    let sign = target.find(['=', '|'])?;
    let value = &target[sign..].strip_prefix('=')?;
    (!value.trim().is_empty()).then(|| inner.len() - value.len())
}

/// The tags in order, found as the library's lexer finds them.
fn tags(source: &str) -> Vec<Tag> {
    let bytes = source.as_bytes();
    let find = |from: usize, what: &str| source[from..].find(what).map(|at| from + at);
    let mut tags = Vec::new();
    let mut at = 0;
    // Of all tags together, as the lexer has it.
    let mut open_brackets = 0;
    while let Some(brace) = find(at, "{") {
        at = brace + 1;
        let end = match bytes.get(at) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => match find(at + 1, "#}") {
                Some(end) => {
                    at = end + 2;
                    continue;
                }
                None => break,
            },
            _ => continue,
        };
        let marked = matches!(bytes.get(at + 1), Some(b'-' | b'+'));
        let begin = at + 1 + usize::from(marked);
        if end == "%}"
            && let Some(mut rest) = after_word(&source[begin..], "raw")
        {
            // Nothing is a tag up to the end of a raw block.
            let text = loop {
                let Some((_, tag)) = rest.split_once("{%") else {
                    return tags;
                };
                let unmarked = tag.strip_prefix(['-', '+']).unwrap_or(tag);
                match after_word(unmarked, "endraw") {
                    Some(text) => break text,
                    None => rest = tag,
                }
            };
            at = source.len() - text.len();
            continue;
        }
        at = begin;
        let mut code_bytes = 0;
        while let Some(&byte) = bytes.get(at) {
            let signed = matches!(byte, b'-' | b'+');
            if open_brackets == 0 && bytes[at + usize::from(signed)..].starts_with(end.as_bytes()) {
                break;
            }
            code_bytes += 1;
            at += 1;
            match byte {
                b'(' | b'[' | b'{' => open_brackets += 1,
                b')' | b']' | b'}' => open_brackets -= 1,
                b'\'' | b'"' => {
                    while bytes.get(at).is_some_and(|&b| b != byte) {
                        at += 1 + usize::from(bytes[at] == b'\\');
                    }
                    code_bytes += 1;
                    at += 1;
                }
                _ => {}
            }
        }
        // A tag or string without an end: whatever it is, it does not compile.
        let closed = at < bytes.len();
        tags.push(Tag {
            inner: begin..if closed { at } else { begin },
            code_bytes,
        });
        if !closed {
            break;
        }
        at += end.len() + usize::from(matches!(bytes[at], b'-' | b'+'));
    }
    tags
}

/// What follows `word %}`.
fn after_word<'a>(tag: &'a str, word: &str) -> Option<&'a str> {
    let space = |c: char| c.is_ascii_whitespace();
    let rest = tag.trim_start_matches(space).strip_prefix(word)?;
    let rest = rest.trim_start_matches(space);
    rest.strip_prefix(['-', '+'])
        .unwrap_or(rest)
        .strip_prefix("%}")
}

/// A bound that a rendering went beyond, to be told from other failures.
#[derive(Debug)]
pub(super) struct Beyond(pub TemplateLimit);

impl std::fmt::Display for Beyond {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Beyond {}

impl From<TemplateLimit> for minijinja::Error {
    fn from(limit: TemplateLimit) -> Self {
        Self::new(ErrorKind::InvalidOperation, limit.to_string()).with_source(Beyond(limit))
    }
}

/// The value, if it is within the bounds. Measuring is work, too.
///
/// # Errors
/// Too deep, too large when written out, or with a namespace in it, which might come to hold itself.
pub(super) fn measure(state: &State, value: &Value) -> Result<(), minijinja::Error> {
    measure_within(state, value, 0)
}

/// [`FILTER`].
pub(super) fn measured(state: &State, value: Value) -> Result<Value, minijinja::Error> {
    measure(state, &value).map(|()| value)
}

/// [`FIELD_FILTER`]: the value comes into a namespace.
pub(super) fn measured_field(state: &State, value: Value) -> Result<Value, minijinja::Error> {
    measure_within(state, &value, 1).map(|()| value)
}

fn measure_within(state: &State, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
    let mut measure = Measure {
        bytes: 0,
        elements: 0,
    };
    let result = measure.add(value, depth);
    state.consume_fuel(measure.elements / ELEMENTS_PER_FUEL)?;
    Ok(result?)
}

struct Measure {
    bytes: usize,
    elements: u64,
}

impl Measure {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), TemplateLimit> {
        self.elements += 1;
        let text = value.as_str().map_or(0, str::len);
        self.bytes = self.bytes.saturating_add(ELEMENT_BYTES + text);
        if self.bytes > MAX_VALUE_BYTES {
            return Err(TemplateLimit::ValueBytes(MAX_VALUE_BYTES));
        }
        let kind = value.kind();
        let Some(object) = value.as_object() else {
            return Ok(());
        };
        if !matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            return Ok(());
        }
        if depth > 0 && is_namespace(value) {
            return Err(TemplateLimit::NestedNamespace);
        }
        if depth == MAX_VALUE_DEPTH {
            return Err(TemplateLimit::ValueDepth(MAX_VALUE_DEPTH));
        }
        if kind == ValueKind::Map {
            for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                self.add(&key, depth + 1)?;
                self.add(&value, depth + 1)?;
            }
        } else {
            for value in object.try_iter().into_iter().flatten() {
                self.add(&value, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// The library does not give out the type of its namespaces, only its name.
fn is_namespace(value: &Value) -> bool {
    let object = value.as_object();
    object.is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

#[cfg(test)]
pub(super) fn longest_tag(source: &str) -> usize {
    let code = tags(source).into_iter().map(|tag| tag.code_bytes);
    code.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_set_are_measured() {
        let same = |source: &str| (source.to_owned(), source.to_owned());
        let wrapped = |marked: &str, filter: &str| {
            let [start, value, end] = [0, 1, 2].map(|i| marked.split('@').nth(i).unwrap());
            (
                format!("{start}{value}{end}"),
                format!("{start}({value})|{filter}{end}"),
            )
        };
        for (source, expected) in [
            wrapped("a{% set x =@ 1 @%}b", FILTER),
            wrapped("{%- set x=@y == '%}'@-%}", FILTER),
            wrapped("{%+ set\nx, y =@ {'a': {}}, \"=\\\"\" @+%}", FILTER),
            wrapped("{%set n.x =@ n.x|f(a=1) @%}", FIELD_FILTER),
            wrapped("{% set(n.x, y) =@ 1, 2 @%}", FIELD_FILTER),
            wrapped("{# {% set y = 1 %} #}{% set x =@ 1 @%}", FILTER),
            wrapped("{# {{ #}{% set x =@ 1 @%}{", FILTER),
            wrapped(
                "{% raw %}{#{{{%- raw %}{% endraw -%}{% set x =@ 1 @%}",
                FILTER,
            ),
            wrapped("{{ {'a': {}}}}{% set x =@ 1 @%}", FILTER),
            wrapped("{{ '}}' ~ '\\'{% set y = 1 %}' }}{% set x =@ 1 @%}", FILTER),
        ]
        .into_iter()
        .chain(
            [
                "{{{% set x = 1 %}",
                "",
                "{",
                "{{",
                "{% set x = ",
                "{% set x = '%}",
                "{% set x = '\\",
                "{% set x = (1 %}",
                "{% set x = %}",
                "{% set x %}a = b{% endset %}",
                "{% set x | f(a=1) %}{% endset %}",
                "{% settle = 1 %}",
                "{% if set == 1 %}",
                "{{ set x = 1 }",
                "{% raw %}{% set x = 1 %}",
                "{# {% set x = 1 %}",
                "é{%é%}{{é",
            ]
            .map(same),
        ) {
            assert_eq!(prepared(&source).unwrap(), expected);
        }
    }

    #[test]
    fn strings_may_be_long_and_tags_may_not() {
        let long = "x".repeat(MAX_TAG_BYTES);
        for string in ["'", "\""] {
            assert!(prepared(&format!("{{{{ {string}{long}\\{string}{string} }}}}")).is_ok());
        }
        let line_of = |source: String| prepared(&source).unwrap_err().0;
        assert_eq!(line_of(format!("a\n{{{{ {long}}}}}")), 2);
        // Neither brackets nor strings nor raw blocks hide the end of a tag, nor the beginning of one.
        assert_eq!(line_of(format!("{{{{ {{'a':{{}}}}\n{long} }}}}")), 1);
        assert_eq!(line_of(format!("{{{{ '}}}}'\n{long} }}}}")), 1);
        assert_eq!(
            line_of(format!("{{% raw %}}{{#{{% endraw %}}\n{{{{{long} }}}}")),
            2
        );
        assert_eq!(line_of(format!("{{#}}{{{{#}}\n{{{{{long} }}}}")), 2);
    }
}
