//! `phi3_v`: Phi-3-vision and Phi-3.5-vision.
//!
//! What is particular: a `phi3` decoder, and beside it a CLIP encoder whose features take the places of
//! embedded tokens (see [`crate::vision`]).

use crate::clip::ClipConfig;
use crate::config::{Config, ConfigError, Fields};
use crate::family::Family;
use crate::image::TILE;
use crate::phi3;
use crate::vision::{self, PartOrder, VisionConfig};
use crate::weights::Spec;

pub(crate) fn configure(f: &Fields<'_>) -> Result<Config, ConfigError> {
    let mut config = phi3::configure_as(f, Family::Phi3V)?;
    let layer = f.object("embd_layer.", "embd_layer")?;
    for (field, expected) in [("embedding_cls", "image"), ("projection_cls", "mlp")] {
        if layer.text(field)?.is_some_and(|found| found != expected) {
            return layer.wrong(field, format!("\"{expected}\""));
        }
    }
    for field in ["use_hd_transform", "with_learnable_separator"] {
        if layer.flag(field)? == Some(false) {
            return layer.wrong(field, "true");
        }
    }
    let order = match layer.text("hd_transform_order")? {
        Some("sub_glb") => PartOrder::TilesFirst,
        // What the published code does when nothing is said.
        Some("glb_sub") | None => PartOrder::GlobalFirst,
        Some(_) => return layer.wrong("hd_transform_order", "\"sub_glb\" or \"glb_sub\""),
    };
    let processor = f.object("img_processor.", "img_processor")?;
    if processor.text("name")? != Some("clip_vision_model") {
        return processor.wrong("name", "\"clip_vision_model\"");
    }
    let clip = match processor.value("tiny_vision_config") {
        // Published folders name the encoder and do not describe it.
        None => {
            const KNOWN: &str = "openai/clip-vit-large-patch14-336";
            if processor.text("model_name")?.is_some_and(|n| n != KNOWN) {
                return processor.wrong("model_name", format!("\"{KNOWN}\""));
            }
            ClipConfig::VIT_L_14_336
        }
        Some(_) => ClipConfig::read(
            &processor.object("img_processor.tiny_vision_config.", "tiny_vision_config")?,
        )?,
    };
    if clip.image_size != TILE || clip.grid() != vision::GRID {
        let expected = format!(
            "an encoder of {TILE} pixels and {0} x {0} patches",
            vision::GRID
        );
        return f.wrong("img_processor", expected);
    }
    let width = clip.hidden_size;
    if processor
        .count("image_dim_out", 0..=usize::MAX)?
        .is_some_and(|w| w != width)
    {
        return processor.wrong(
            "image_dim_out",
            format!("{width}, the encoder's hidden_size"),
        );
    }
    if processor
        .count("num_img_tokens", 0..=usize::MAX)?
        .is_some_and(|n| n != vision::TILE_TOKENS)
    {
        return processor.wrong("num_img_tokens", vision::TILE_TOKENS.to_string());
    }
    config.vision = Some(VisionConfig { clip, order });
    Ok(config)
}

/// Every tensor that a checkpoint of this configuration has.
pub(crate) fn specs(c: &Config) -> Vec<Spec> {
    let mut specs = phi3::specs(c);
    if let Some(vision) = &c.vision {
        specs.extend(vision.specs(c.hidden_size));
    }
    specs
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn published() -> Value {
        json!({
            "model_type": "phi3_v", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096,
            "embd_layer": {
                "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                "use_hd_transform": true, "with_learnable_separator": true,
            },
            "img_processor": {
                "image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model", "num_img_tokens": 144,
            },
        })
    }

    fn read(config: &Value) -> Result<Config, ConfigError> {
        Config::from_json(Path::new("config.json"), config.to_string().as_bytes())
    }

    #[test]
    fn an_encoder_that_is_only_named_is_the_published_one() {
        let vision = read(&published()).unwrap().vision.unwrap();
        assert_eq!(vision.clip, ClipConfig::VIT_L_14_336);
        assert_eq!(vision.order, PartOrder::TilesFirst);
        let mut other = published();
        other["embd_layer"]["hd_transform_order"] = json!("glb_sub");
        let vision = read(&other).unwrap().vision.unwrap();
        assert_eq!(vision.order, PartOrder::GlobalFirst);
    }

    #[test]
    fn every_bad_field_is_named() {
        let tiny = json!({
            "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2,
            "num_hidden_layers": 3, "image_size": 336, "patch_size": 14,
        });
        let with = |field: &str, value: Value| {
            let mut tiny = tiny.clone();
            tiny[field] = value;
            tiny
        };
        for (object, field, value, expected) in [
            (
                "embd_layer",
                "hd_transform_order",
                json!("both"),
                "'embd_layer.hd_transform_order' is \"both\"",
            ),
            (
                "embd_layer",
                "use_hd_transform",
                json!(false),
                "'embd_layer.use_hd_transform' is false, expected true",
            ),
            (
                "embd_layer",
                "with_learnable_separator",
                json!(false),
                "expected true",
            ),
            (
                "embd_layer",
                "projection_cls",
                json!("linear"),
                "expected \"mlp\"",
            ),
            (
                "img_processor",
                "name",
                json!("vit"),
                "'img_processor.name' is \"vit\", expected \"clip_vision_model\"",
            ),
            (
                "img_processor",
                "model_name",
                json!("other/clip"),
                "'img_processor.model_name'",
            ),
            (
                "img_processor",
                "image_dim_out",
                json!(768),
                "expected 1024, the encoder's hidden_size",
            ),
            (
                "img_processor",
                "num_img_tokens",
                json!(576),
                "expected 144",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                json!(7),
                "'img_processor.tiny_vision_config' is 7, expected an object",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("num_attention_heads", json!(5)),
                "a divisor of hidden_size 32",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("patch_size", json!(0)),
                "'img_processor.tiny_vision_config.patch_size' is 0",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("patch_size", json!(28)),
                "24 x 24 patches",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("image_size", json!(u64::MAX)),
                "image_size",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("hidden_act", json!("gelu")),
                "expected \"quick_gelu\"",
            ),
            (
                "img_processor",
                "tiny_vision_config",
                with("num_channels", json!(4)),
                "expected 3",
            ),
        ] {
            let mut config = published();
            config[object][field] = value;
            let error = read(&config).expect_err(field).to_string();
            assert!(error.contains(expected), "{error}\nexpected: {expected}");
        }
        for object in ["embd_layer", "img_processor"] {
            let mut config = published();
            config[object] = json!([]);
            let error = read(&config).expect_err(object).to_string();
            assert!(
                error.contains(object) && error.contains("an object"),
                "{error}"
            );
        }
    }
}
