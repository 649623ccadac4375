//! Opening a tokenizer whose file lists tokens by rank, as Phi-3-small's does: the file is parsed, the
//! merge of every token is found, and the tables are built. Bytes are those of the file.
//!
//! The vocabulary is the one that `synth` makes up, of 100,256 ranks. What is checked is the ids of words:
//! they must be those of the definition.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use phidias::models::synth::Preset;
use phidias::models::text::{Bos, Tokenizer};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

const FILE: &str = "cl100k_base.tiktoken";

/// Words that are cut at the spaces before them; of several tokens each, for no token has five letters.
const TEXT: &str = "sculptor measured every surface until nothing interrupted the evening light";

fn open(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let preset: Preset = "phi-3-small-8k".parse().expect("a preset");
    for (name, bytes) in preset.tokenizer_files().expect("a preset") {
        fs::write(folder.path().join(name), bytes).expect("a file");
    }
    let file = fs::read_to_string(folder.path().join(FILE)).expect("ranks");
    let mut group = c.benchmark_group("open .tiktoken, 100256 ranks, bytes");
    (group.sampling_mode(SamplingMode::Flat).sample_size(10))
        .measurement_time(Duration::from_secs(3))
        .throughput(Throughput::Bytes(file.len() as u64));
    let mut checked = false;
    group.bench_function("open", |b| {
        if !checked {
            check(&opened(folder.path()), &file);
            checked = true;
        }
        b.iter(|| opened(folder.path()));
    });
    group.finish();
}

fn opened(folder: &Path) -> Tokenizer {
    let tokenizer = Tokenizer::open(folder).expect("a vocabulary");
    tokenizer.expect("a tokenizer")
}

/// Compares the ids of [`TEXT`] with those of the definition.
fn check(tokenizer: &Tokenizer, file: &str) {
    let ranks: HashMap<Vec<u8>, u32> = (file.lines())
        .map(|line| {
            let (token, rank) = line.split_once(' ').expect("a token and its rank");
            let token = BASE64.decode(token).expect("base64");
            (token, rank.parse().expect("a rank"))
        })
        .collect();
    let want: Vec<u32> = (words(TEXT).flat_map(|word| joined(word, &ranks))).collect();
    let got = tokenizer.encode(TEXT, Bos::Omit).expect("ids");
    assert!(want.len() > 2 * TEXT.split(' ').count(), "{want:?}");
    assert_eq!(got, want);
}

/// The words of a line, each with the space before it.
fn words(line: &str) -> impl Iterator<Item = &[u8]> {
    let starts = line.match_indices(' ').map(|(at, _)| at);
    let ends = starts.clone().chain([line.len()]);
    ([0].into_iter().chain(starts))
        .zip(ends)
        .map(|(start, end)| &line.as_bytes()[start..end])
}

/// The definition: as long as two neighbours together are a token, those whose token has the lowest
/// rank are joined, the first of equals.
fn joined(word: &[u8], ranks: &HashMap<Vec<u8>, u32>) -> Vec<u32> {
    let mut parts: Vec<Vec<u8>> = word.iter().map(|byte| vec![*byte]).collect();
    loop {
        let pairs = parts.windows(2).enumerate();
        let known = pairs.filter_map(|(i, pair)| Some((*ranks.get(&pair.concat())?, i)));
        let Some((_, first)) = known.min() else {
            break;
        };
        let second = parts.remove(first + 1);
        parts[first].extend(second);
    }
    parts.iter().map(|part| ranks[part]).collect()
}

criterion_group!(benches, open);
criterion_main!(benches);
