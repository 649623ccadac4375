//! The files beside `config.json` that need not be there: how to generate, how to prepare pictures.

use super::{ConfigError, Fields, Result, parse};
use crate::image::layout::MAX_CROPS;
use phidias_engine::files::{MAX_JSON_BYTES, read_at_most};
use std::path::Path;

/// What `generation_config.json` says; everything is optional there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// 0 when it asks for greedy decoding.
    pub temperature: Option<f32>,
    /// Keep this many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Keep the likeliest tokens up to this mass.
    pub top_p: Option<f32>,
    /// Keep tokens of at least this share of the likeliest one's probability.
    pub min_p: Option<f32>,
    /// Penalty on repeated tokens.
    pub repetition_penalty: Option<f32>,
}

/// What `preprocessor_config.json` of a vision model says.
#[derive(Clone, Debug, PartialEq)]
pub struct PreprocessorConfig {
    /// Most tiles a picture is cut into, the global view not counted: 1 to [`MAX_CROPS`].
    pub num_crops: usize,
    /// Subtracted from red, green and blue of 0 to 1.
    pub image_mean: [f32; 3],
    /// What is left is divided by this.
    pub image_std: [f32; 3],
}

/// The contents of a file that need not be there.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match read_at_most(path, MAX_JSON_BYTES) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a folder; a missing file says nothing.
    /// # Errors
    /// [`ConfigError`].
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("generation_config.json");
        read_if_there(&path)?
            .map_or_else(|| Ok(Self::default()), |text| Self::from_json(&path, &text))
    }

    /// Reads a configuration; `path` is for messages.
    /// # Errors
    /// [`ConfigError`].
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        let map = parse(path, text)?;
        let f = Fields::new(path, &map);
        let sample = f.flag("do_sample")?.unwrap_or(false);
        let number = |field, range| f.number(field, range).map(|v| v.map(|v| v as f32));
        let temperature = number("temperature", 0.0..=100.0)?;
        Ok(Self {
            eos_token_ids: f.ids("eos_token_id")?,
            temperature: Some(if sample {
                temperature.unwrap_or(1.0)
            } else {
                0.0
            }),
            top_k: f.count("top_k", 0..=1 << 22)?,
            // The sampler keeps at least one token, so 0 has no meaning.
            top_p: number("top_p", 1e-6..=1.0)?,
            min_p: number("min_p", 0.0..=1.0)?,
            repetition_penalty: number("repetition_penalty", 1e-3..=1e3)?,
        })
    }
}

/// What the published folders of Phi-3-vision say.
impl Default for PreprocessorConfig {
    fn default() -> Self {
        Self {
            num_crops: 16,
            image_mean: Self::CLIP_MEAN,
            image_std: Self::CLIP_STD,
        }
    }
}

impl PreprocessorConfig {
    /// CLIP's means and deviations, which the family keeps.
    pub const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
    /// See [`CLIP_MEAN`](Self::CLIP_MEAN).
    pub const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

    /// Reads `preprocessor_config.json` of a folder. `None`: there is no such file.
    /// # Errors
    /// [`ConfigError`].
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("preprocessor_config.json");
        (read_if_there(&path)?.map(|text| Self::from_json(&path, &text))).transpose()
    }

    /// Reads a configuration; `path` is for messages.
    /// # Errors
    /// [`ConfigError`].
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        let map = parse(path, text)?;
        let f = Fields::new(path, &map);
        Ok(Self {
            num_crops: f.required("num_crops", 1..=MAX_CROPS)?,
            image_mean: f.colours("image_mean", Self::CLIP_MEAN, 0.0)?,
            // A deviation of zero would divide by it.
            image_std: f.colours("image_std", Self::CLIP_STD, 1e-3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;

    #[test]
    fn preprocessor_config_is_optional_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(PreprocessorConfig::open(folder.path()).unwrap(), None);
        let path = folder.path().join("preprocessor_config.json");
        fs::write(&path, r#"{"num_crops": 4, "image_std": [0.5, 0.25, 1]}"#).unwrap();
        let expected = PreprocessorConfig {
            num_crops: 4,
            image_mean: PreprocessorConfig::CLIP_MEAN,
            image_std: [0.5, 0.25, 1.0],
        };
        assert_eq!(
            PreprocessorConfig::open(folder.path()).unwrap(),
            Some(expected)
        );
        for (bad, message) in [
            (r#"{}"#, "field 'num_crops' is missing"),
            (
                r#"{"num_crops": 0}"#,
                "'num_crops' is 0, expected an integer from 1 to 64",
            ),
            (r#"{"num_crops": 65}"#, "'num_crops' is 65"),
            (
                r#"{"num_crops": 4, "image_mean": [0.5, 0.5]}"#,
                "'image_mean' is [0.5,0.5], expected three numbers from 0 to 1",
            ),
            (
                r#"{"num_crops": 4, "image_mean": 0.5}"#,
                "'image_mean' is 0.5",
            ),
            (
                r#"{"num_crops": 4, "image_std": [0.5, 0, 0.5]}"#,
                "'image_std' is [0.5,0,0.5], expected three numbers from 0.001 to 1",
            ),
            ("[4]", "not a JSON object"),
        ] {
            fs::write(&path, bad).unwrap();
            let error = PreprocessorConfig::open(folder.path()).unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains(message) && error.contains("preprocessor_config.json"),
                "{error}"
            );
        }
    }

    #[test]
    fn generation_config_is_optional_and_checked() {
        let read = |v: Value| GenerationConfig::from_json(Path::new("g"), v.to_string().as_bytes());
        assert_eq!(
            read(json!({"eos_token_id": [1, 2]})).unwrap().eos_token_ids,
            [1, 2]
        );
        assert_eq!(
            read(json!({"temperature": 0.7})).unwrap().temperature,
            Some(0.0)
        );
        assert_eq!(
            read(json!({"temperature": 0.5, "do_sample": true}))
                .unwrap()
                .temperature,
            Some(0.5)
        );
        for top_p in [json!(2), json!(0), json!(1e-60)] {
            let error = read(json!({ "top_p": top_p })).unwrap_err().to_string();
            assert!(error.contains("field 'top_p' is"), "{error}");
        }
    }
}
