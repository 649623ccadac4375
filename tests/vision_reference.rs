//! Every vision fixture against the outputs of the reference implementation: features of single crops,
//! embedded prompts, logits of one and of several pictures, greedy continuations.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set.

mod common;

use common::relative_error;
use phidias::engine::backend::Cpu;
use phidias::engine::kernels::cpu::Kernels;
use phidias::engine::pool::Pool;
use phidias::engine::tensor::Buffer;
use phidias::models::image::{CROP_LEN, Picture, Processed};
use phidias::models::session::Piece;
use phidias::models::transformer::Point;
use phidias::models::{clip, image::ImageProcessor};
use phidias::{Model, OpenOptions, Session, SessionOptions, WeightFormat};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest relative error, ||a - b|| / ||b||, of a row in f32.
const TOLERANCE: f64 = 1e-4;

struct Fixture {
    folder: PathBuf,
    manifest: serde_json::Value,
    floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    ids: HashMap<String, Vec<i64>>,
}

fn fixtures() -> Vec<Fixture> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")];
    roots.extend(std::env::var_os("PHIDIAS_FIXTURES").map(PathBuf::from));
    let mut found = Vec::new();
    for root in roots {
        let entries =
            std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let mut folders: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        folders.sort();
        for folder in folders {
            let Ok(manifest) = std::fs::read(folder.join("manifest.json")) else {
                continue;
            };
            let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
            if manifest["kind"] == "phi3_v" {
                found.push(Fixture::read(folder, manifest));
            }
        }
    }
    assert!(!found.is_empty(), "no vision model among the fixtures");
    found
}

impl Fixture {
    fn read(folder: PathBuf, manifest: serde_json::Value) -> Self {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (mut floats, mut ids) = (HashMap::new(), HashMap::new());
        for (name, view) in file.tensors() {
            let data = view.data();
            match view.dtype() {
                safetensors::Dtype::F32 => {
                    let values = data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                    floats.insert(name, (view.shape().to_vec(), values.collect()));
                }
                safetensors::Dtype::I64 => {
                    let values = data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
                    ids.insert(name, values.collect());
                }
                other => panic!("{name} is {other:?}"),
            }
        }
        Self {
            folder,
            manifest,
            floats,
            ids,
        }
    }

    fn open(&self, format: WeightFormat) -> Arc<Model> {
        let options = OpenOptions {
            format: Some(format),
            ..OpenOptions::default()
        };
        let model = Model::open(&self.folder, options);
        Arc::new(model.unwrap_or_else(|e| panic!("{}: {e}", self.folder.display())))
    }

    /// On the CPU, and on every device.
    fn open_everywhere(&self, format: WeightFormat) -> Vec<Arc<Model>> {
        let devices = common::on_devices(&self.folder, format);
        let on_devices = devices.into_iter().map(|(_, model)| model);
        [self.open(format)].into_iter().chain(on_devices).collect()
    }

    /// The pictures of a prompt, in order.
    fn pictures(&self, prompt: usize, processor: &ImageProcessor) -> Vec<Processed> {
        let images = self.manifest["prompts"][prompt]["images"]
            .as_array()
            .unwrap();
        let open = |index: &serde_json::Value| {
            let name = format!("image{index}.png");
            let picture = Picture::open(&self.folder.join(name)).unwrap();
            processor.process(&picture).unwrap()
        };
        images.iter().map(open).collect()
    }

    /// The prompt in pieces: runs of text, and a picture wherever ids are negative. The pictures stand in
    /// the order of their appearance, whatever their numbers.
    fn pieces(&self, prompt: usize, session: &mut Session) -> Vec<Piece> {
        let model = Arc::clone(session.model());
        let (_, processor) = model.vision().unwrap();
        let pictures = self.pictures(prompt, processor);
        let mut crops = Vec::new();
        let features = session.encode(&pictures, &mut |done| crops.push(done));
        let features = features.unwrap();
        assert_eq!(
            crops.last(),
            pictures
                .iter()
                .map(Processed::crops)
                .reduce(|a, b| a + b)
                .as_ref()
        );
        for (rows, picture) in features.iter().zip(&pictures) {
            assert_eq!(rows.rows(), picture.tokens());
        }
        let (mut pieces, mut next) = (Vec::new(), 0);
        let mut features = features.into_iter();
        let ids = &self.ids[&format!("prompt{prompt}.input_ids")];
        while next < ids.len() {
            let picture = ids[next] < 0;
            let run = ids[next..]
                .iter()
                .take_while(|id| (**id < 0) == picture && (!picture || **id == ids[next]));
            let run: Vec<i64> = run.copied().collect();
            next += run.len();
            pieces.push(match picture {
                false => Piece::Text(run.iter().map(|id| u32::try_from(*id).unwrap()).collect()),
                true => {
                    let rows = features.next().expect("a picture for each run");
                    assert_eq!(rows.rows(), run.len(), "tokens of a picture");
                    Piece::Picture(rows)
                }
            });
        }
        assert!(features.next().is_none(), "a run for each picture");
        pieces
    }

    fn prompts(&self) -> usize {
        self.manifest["prompts"].as_array().unwrap().len()
    }

    fn row(&self, name: &str, row: usize) -> &[f32] {
        let (shape, values) = &self.floats[name];
        let width = *shape.last().unwrap();
        &values[row * width..][..width]
    }

    fn check(&self, name: &str, row: usize, got: &[f32]) {
        let error = relative_error(got, self.row(name, row));
        let folder = self.folder.display();
        assert!(error <= TOLERANCE, "{folder} {name}, row {row}: {error:e}");
    }
}

fn cpu() -> Cpu {
    Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()))
}

fn session(model: &Arc<Model>, chunk: usize) -> Session {
    let options = SessionOptions {
        chunk,
        threads: Some(2),
        ..SessionOptions::default()
    };
    Session::new(Arc::clone(model), &options).unwrap()
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[test]
fn features_of_single_crops() {
    let mut checked = 0;
    for fixture in fixtures() {
        let model = fixture.open(WeightFormat::F32);
        let (vision, processor) = model.vision().unwrap();
        for prompt in 0..fixture.prompts() {
            let pictures = fixture.pictures(prompt, processor);
            for crop in 0..2 {
                let name = format!("prompt{prompt}.clip_features_crop{crop}");
                if !fixture.floats.contains_key(&name) {
                    continue;
                }
                let mut pixels = vec![0.0; CROP_LEN];
                pictures[0].crop(crop, &mut pixels);
                let mut s = clip::Scratch::default();
                let encoder = vision.clip();
                let depth = encoder.config().num_hidden_layers - 1;
                cpu().enter(|ops| encoder.forward(ops, &pixels, depth, &mut s, &mut |_, _| {}));
                for patch in 0..encoder.config().tokens() - 1 {
                    fixture.check(&name, patch, s.hidden().row(patch + 1));
                }
                checked += 1;
            }
        }
    }
    assert!(checked >= 2, "{checked} crops");
}

#[test]
fn embedded_prompts_and_logits() {
    let mut pictures = 0;
    for fixture in fixtures() {
        let models = fixture.open_everywhere(WeightFormat::F32);
        let prompts = (models.iter()).flat_map(|m| (0..fixture.prompts()).map(move |p| (m, p)));
        for (model, prompt) in prompts {
            let mut session = session(model, 100);
            let pieces = fixture.pieces(prompt, &mut session);
            pictures += pieces
                .iter()
                .filter(|p| matches!(p, Piece::Picture(_)))
                .count();
            let positions = &fixture.ids[&format!("prompt{prompt}.logit_positions")];
            let embeds = format!("prompt{prompt}.inputs_embeds");
            let mut seen = 0;
            let mut each = |position: usize, logits: &[f32]| {
                let row = positions.iter().position(|p| *p == position as i64);
                if let Some(row) = row {
                    let name = format!("prompt{prompt}.logits");
                    fixture.check(&name, row, logits);
                    assert_eq!(argmax(logits), argmax(fixture.row(&name, row)));
                    seen += 1;
                }
            };
            let mut observe = |point: Point, first: usize, rows: &Buffer| {
                if point == Point::Embed && fixture.floats.contains_key(&embeds) {
                    (0..rows.rows()).for_each(|t| fixture.check(&embeds, first + t, rows.row(t)));
                }
            };
            let ids = session.attach(&pieces);
            session
                .extend_observed(&ids, &mut each, &mut observe)
                .unwrap();
            assert_eq!(seen, positions.len());
        }
    }
    assert!(pictures >= 3, "{pictures} pictures");
}

#[test]
fn greedy_continuations() {
    for fixture in fixtures() {
        let models = fixture.open_everywhere(WeightFormat::F32);
        let prompts = (models.iter()).flat_map(|m| (0..fixture.prompts()).map(move |p| (m, p)));
        for (model, prompt) in prompts {
            let mut session = session(model, 512);
            let mut next = fixture.pieces(prompt, &mut session);
            let name = format!("prompt{prompt}.greedy_logits");
            let rows = fixture.floats[&name].0[0];
            for (step, id) in fixture.ids[&format!("prompt{prompt}.greedy_ids")]
                .iter()
                .enumerate()
            {
                let ids = session.attach(&next);
                let logits = session.extend(&ids).unwrap();
                if step < rows {
                    fixture.check(&name, step, logits);
                }
                assert_eq!(argmax(logits) as i64, *id, "{prompt}, step {step}");
                next = vec![Piece::Text(vec![u32::try_from(*id).unwrap()])];
            }
        }
    }
}

/// The same logits, bit for bit, whatever the chunks, and when a part is taken back and given again.
#[test]
fn chunks_and_truncation_change_nothing() {
    for fixture in fixtures() {
        for format in [WeightFormat::F32, WeightFormat::Q8] {
            let model = fixture.open(format);
            let mut whole = session(&model, 4096);
            let pieces = fixture.pieces(0, &mut whole);
            let ids = whole.attach(&pieces);
            let want = whole.extend(&ids).unwrap().to_vec();
            for chunk in [64, 333] {
                let mut other = session(&model, chunk);
                let ids = other.attach(&pieces);
                assert_eq!(other.extend(&ids).unwrap(), want, "{format} {chunk}");
            }
            // Back to the middle of the first picture, and its rest again.
            let Some(at) = pieces.iter().position(|p| matches!(p, Piece::Picture(_))) else {
                continue;
            };
            let Piece::Picture(rows) = &pieces[at] else {
                unreachable!("found as a picture")
            };
            let before: usize = (pieces[..at].iter())
                .map(|p| match p {
                    Piece::Text(ids) => ids.len(),
                    Piece::Picture(rows) => rows.rows(),
                })
                .sum();
            let kept = 100;
            whole.truncate(before + kept);
            let mut rest = Buffer::default();
            rest.reshape(rows.rows() - kept, rows.cols());
            let values = &rows.data()[kept * rows.cols()..];
            rest.data_mut().copy_from_slice(values);
            let mut again = vec![Piece::Picture(Arc::new(rest))];
            again.extend_from_slice(&pieces[at + 1..]);
            let ids = whole.attach(&again);
            assert_eq!(whole.extend(&ids).unwrap(), want, "{format}");
        }
    }
}

/// The memory plan counts on it: while pictures are encoded, the cache holds no more than its positions take.
#[test]
fn encoding_gives_back_what_the_cache_does_not_need() {
    for fixture in fixtures() {
        let mut session = session(&fixture.open(WeightFormat::F32), 512);
        let ids: Vec<u32> = (0..600).map(|i| i % 50).collect();
        session.extend(&ids).unwrap();
        let full = session.cache().bytes();
        session.truncate(300);
        assert_eq!(session.cache().bytes(), full);
        fixture.pieces(0, &mut session);
        let (model, kind) = (session.model(), session.cache().kind());
        let needed = model.config().kv_shape().bytes(kind, 300);
        assert!(needed < full);
        assert_eq!(session.cache().bytes(), needed);
        // The sequence goes on from where it was.
        let logits = session.extend(&ids[300..]).unwrap().to_vec();
        session.truncate(0);
        assert_eq!(session.extend(&ids).unwrap(), logits);
    }
}

/// The encoder has its own error figure: the cosine of the projected features with those in f32.
#[test]
fn quantized_features_point_the_same_way() {
    for fixture in fixtures() {
        let features = |format| -> Vec<f32> {
            let pieces = fixture.pieces(0, &mut session(&fixture.open(format), 512));
            let rows = pieces.into_iter().find_map(|piece| match piece {
                Piece::Picture(rows) => Some(rows.data().to_vec()),
                Piece::Text(_) => None,
            });
            rows.expect("a picture in the first prompt")
        };
        let exact = features(WeightFormat::F32);
        for (format, least) in [(WeightFormat::Q8, 0.999), (WeightFormat::Q4, 0.95)] {
            let got = features(format);
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter()
                    .zip(b)
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum()
            };
            let cosine = dot(&exact, &got) / (dot(&exact, &exact) * dot(&got, &got)).sqrt();
            println!("{} {format}: {cosine:.6}", fixture.folder.display());
            assert!((least..1.0).contains(&cosine), "{format}: {cosine}");
        }
    }
}
