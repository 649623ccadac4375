//! Pictures and prompts with pictures against what the reference implementations make of them.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set.
//! Nothing here is keyed to known values: a fixture is whatever its own files say.

use phidias_models::config::PreprocessorConfig;
use phidias_models::image::{CROP_LEN, Grid, ImageProcessor, Layout, Picture, Processed, TILE};
use phidias_models::text::{Segment, Tokenizer, encode_with_images};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Largest error of the global view. It is a sum of 16 products, rounded at every step; the values
/// are below 2.7 and the absolute weights add up to (44/32)^2, so 32 roundings of 2^-24 stay below
/// 32 * 2^-24 * 2.7 * 1.9 = 1e-5.
const GLOBAL_TOLERANCE: f32 = 1e-5;

fn fixture_roots() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")];
    roots.extend(std::env::var_os("PHIDIAS_FIXTURES").map(PathBuf::from));
    roots
}

fn manifest<T: DeserializeOwned>(folder: &Path) -> T {
    let path = folder.join("manifest.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn processor(num_crops: usize) -> ImageProcessor {
    ImageProcessor::new(&PreprocessorConfig {
        num_crops,
        image_mean: PreprocessorConfig::CLIP_MEAN,
        image_std: PreprocessorConfig::CLIP_STD,
    })
}

fn crop(processed: &Processed, index: usize) -> Vec<f32> {
    let mut crop = vec![f32::NAN; CROP_LEN];
    processed.crop(index, &mut crop);
    crop
}

/// Every 16th or 48th row of `[3, TILE, TILE]`, as `[3, TILE / step, TILE]`.
fn every(step: usize, crop: &[f32]) -> Vec<f32> {
    let rows = crop.chunks_exact(TILE).enumerate();
    rows.filter(|(row, _)| (row % TILE).is_multiple_of(step))
        .flat_map(|(_, row)| row.iter().copied())
        .collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{i}]: {a}, expected {b}");
    }
}

/// The tensors of a fixture; not every copy of it has all of them.
struct Expected {
    bytes: Vec<u8>,
}

impl Expected {
    fn open(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        Self { bytes }
    }

    fn find(&self, name: &str, dtype: Dtype) -> Option<Vec<u8>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        assert_eq!(view.dtype(), dtype, "{name}");
        Some(view.data().to_vec())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let data = self.find(name, Dtype::F32)?;
        let floats = data.chunks_exact(4);
        Some(
            floats
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        )
    }

    fn ids(&self, name: &str) -> Option<Vec<i64>> {
        let data = self.find(name, Dtype::I64)?;
        let ids = data.chunks_exact(8);
        Some(
            ids.map(|b| i64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        )
    }
}

#[derive(Deserialize)]
struct ProcessorManifest {
    cases: Vec<Case>,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Case {
    image: String,
    width: usize,
    height: usize,
    num_crops: usize,
    image_size_hw: [usize; 2],
    used_crops_including_global: usize,
    num_img_tokens: usize,
    hd_u8_sha256: String,
    hd_png: Option<String>,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    images: Vec<String>,
    num_crops: usize,
}

fn processor_fixtures() -> Vec<PathBuf> {
    let folders = fixture_roots()
        .into_iter()
        .map(|root| root.join("phi3v-processor"));
    let found: Vec<_> = folders
        .filter(|f| f.join("manifest.json").exists())
        .collect();
    assert!(!found.is_empty(), "no fixtures");
    found
}

#[test]
fn pictures_become_the_reference_crops() {
    for folder in processor_fixtures() {
        let expected = Expected::open(&folder);
        let ProcessorManifest { cases, .. } = manifest(&folder);
        assert!(!cases.is_empty());
        for case in cases {
            let what = format!("{} with {} crops", case.image, case.num_crops);
            let picture = Picture::open(&folder.join(&case.image)).unwrap();
            let sizes = (picture.pixels().width(), picture.pixels().height());
            assert_eq!(sizes, (case.width, case.height), "{what}");
            let processed = processor(case.num_crops).process(&picture).unwrap();
            check_case(&folder, &case, &processed, &expected, &what);
        }
    }
}

fn check_case(folder: &Path, case: &Case, processed: &Processed, expected: &Expected, what: &str) {
    let [height, width] = case.image_size_hw;
    let grid = Grid {
        rows: height / TILE,
        cols: width / TILE,
    };
    let padded = processed.padded();
    assert_eq!(processed.grid(), grid, "{what}");
    assert_eq!((padded.width(), padded.height()), (width, height), "{what}");
    assert_eq!(
        processed.crops(),
        case.used_crops_including_global,
        "{what}"
    );
    assert_eq!(processed.tokens(), case.num_img_tokens, "{what}");
    let layout = Layout::new(case.width, case.height, case.num_crops).unwrap();
    assert_eq!(layout.grid, grid, "{what}");

    let found: String = (Sha256::digest(padded.data()).iter())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(found, case.hd_u8_sha256, "{what}");
    if let Some(png) = &case.hd_png {
        let png = Picture::open(&folder.join(png)).unwrap();
        assert_eq!(png.pixels(), padded, "{what}");
    }

    let stem = case.image.strip_suffix(".png").unwrap();
    let name = |tensor: &str| format!("{stem}.nc{}.{tensor}", case.num_crops);
    let rows = |step| (0..height).step_by(step);
    if let Some(expected) = expected.find(&name("hd_rows"), Dtype::U8) {
        let found: Vec<u8> = (rows(48))
            .flat_map(|y| padded.data()[y * width * 3..][..width * 3].iter().copied())
            .collect();
        assert_eq!(found, expected, "{what}");
    }

    let crops: Vec<_> = (0..processed.crops()).map(|i| crop(processed, i)).collect();
    if let Some(expected) = expected.floats(&name("global")) {
        assert_close(&crops[0], &expected, GLOBAL_TOLERANCE, what);
    }
    let global_rows = expected.floats(&name("global_rows")).expect("global_rows");
    assert_close(&every(16, &crops[0]), &global_rows, GLOBAL_TOLERANCE, what);
    // The tiles' floats are exact: a table of the same three operations.
    let last_rows = expected
        .floats(&name("last_crop_rows"))
        .expect("last_crop_rows");
    assert_eq!(every(48, crops.last().unwrap()), last_rows, "{what}");

    let mean_std = expected
        .floats(&name("crop_mean_std"))
        .expect("crop_mean_std");
    let found: Vec<f32> = crops
        .iter()
        .flat_map(|crop| mean_and_deviation(crop))
        .collect();
    // The reference adds up 338 688 floats in f32, in pieces: a few units of the last place.
    assert_close(&found, &mean_std, 1e-5, what);
}

fn mean_and_deviation(crop: &[f32]) -> [f32; 2] {
    let count = crop.len() as f64;
    let mean = crop.iter().copied().map(f64::from).sum::<f64>() / count;
    let squares = crop.iter().map(|&v| (f64::from(v) - mean).powi(2));
    [mean as f32, (squares.sum::<f64>() / count).sqrt() as f32]
}

#[test]
fn prompts_become_the_reference_ids() {
    for folder in processor_fixtures() {
        let expected = Expected::open(&folder);
        let ProcessorManifest { prompts, .. } = manifest(&folder);
        assert!(!prompts.is_empty());
        let tokenizer = (Tokenizer::open(&folder.join("../tokenizer")).unwrap()).unwrap();
        for (i, prompt) in prompts.iter().enumerate() {
            let tokens = |image: &String| {
                let picture = Picture::open(&folder.join(format!("{image}.png"))).unwrap();
                processor(prompt.num_crops)
                    .process(&picture)
                    .unwrap()
                    .tokens()
            };
            let tokens: Vec<usize> = prompt.images.iter().map(tokens).collect();
            let segments = encode_with_images(&tokenizer, &prompt.text, &tokens).unwrap();
            // The reference writes picture n as ids -n.
            let ids: Vec<i64> = (segments.iter())
                .flat_map(|segment| match segment {
                    Segment::Text(ids) => ids.iter().copied().map(i64::from).collect(),
                    Segment::Image { index, tokens } => vec![-(*index as i64) - 1; *tokens],
                })
                .collect();
            let expected = expected
                .ids(&format!("prompt{i}.input_ids"))
                .expect("input_ids");
            assert_eq!(ids, expected, "{:?}", prompt.text);
        }
    }
}

/// Model fixtures bring pictures, what they resize to, and their global views.
#[test]
fn pictures_of_model_fixtures() {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        images: Vec<Image>,
    }
    #[derive(Deserialize)]
    struct Image {
        file: String,
        hd_png: String,
        num_img_tokens: usize,
    }
    for root in fixture_roots() {
        for entry in std::fs::read_dir(&root).unwrap() {
            let folder = entry.unwrap().path();
            let Ok(Some(processor)) = ImageProcessor::open(&folder) else {
                continue;
            };
            let Manifest { images } = manifest(&folder);
            let expected = Expected::open(&folder);
            for (i, image) in images.iter().enumerate() {
                let what = format!("{} of {}", image.file, folder.display());
                let picture = Picture::open(&folder.join(&image.file)).unwrap();
                let processed = processor.process(&picture).unwrap();
                assert_eq!(processed.tokens(), image.num_img_tokens, "{what}");
                let hd = Picture::open(&folder.join(&image.hd_png)).unwrap();
                assert_eq!(processed.padded(), hd.pixels(), "{what}");
                if let Some(global) = expected.floats(&format!("image{i}.global")) {
                    assert_close(&crop(&processed, 0), &global, GLOBAL_TOLERANCE, &what);
                }
            }
        }
    }
}

/// Small files of every kind of pixel, and what Pillow converts them to.
#[test]
fn files_decode_as_pillow_decodes_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/pictures");
    let mut checked = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some(file) = name.strip_suffix(".rgb.png") else {
            continue;
        };
        let expected = Picture::open(&path).unwrap();
        let found = Picture::open(&folder.join(file)).unwrap();
        let (found, expected) = (found.pixels(), expected.pixels());
        let size = (expected.width(), expected.height());
        assert_eq!((found.width(), found.height()), size, "{file}");
        // JPEG's transform and colours are rounded differently by every decoder, by one step
        // each; where the colours are stored at half the size, what lies between is rounded too.
        let tolerance = if file.ends_with(".jpg") { 4 } else { 0 };
        for (i, (a, b)) in found.data().iter().zip(expected.data()).enumerate() {
            assert!(
                a.abs_diff(*b) <= tolerance,
                "{file}, byte {i}: {a}, expected {b}"
            );
        }
        checked += 1;
    }
    assert!(checked > 30, "{checked} files");
}
