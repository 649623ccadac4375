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
