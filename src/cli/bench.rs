//! `phidias bench`: speed as a share of what the machine can do.

#[cfg(feature = "cuda")]
use super::args::Device;
use super::args::{Bench, Global};
use super::console::{Stdout, Steps, Unit, say};
use super::device;
use super::files;
use super::open::{Origin, Setup, cache_folder, open_source};
use super::stats::{self, routing};
use anyhow::{Context, Result, anyhow, bail};
use phidias::bench::model::Kind;
use phidias::bench::{
    Around, BenchError, Conditions, KernelBench, KernelRecord, LookupBench, LookupRecord,
    ModelBench, Peak, PeakOptions, Peaks, PictureBench, PictureRecord, Progress, Record, Spread,
    Test, roofline,
};
use phidias::engine::PACKED_VERSION;
use phidias::engine::kernels::cpu::peak::Number;
use phidias::engine::machine::{Machine, cpu_name};
use phidias::engine::memory::Size;
use phidias::engine::peaks::best;
use phidias::engine::pool::Pool;
use phidias::models::image::Picture;
use phidias::models::synth::{Preset, SynthOptions, synthesize};
use phidias::models::text::Tokenizer;
use phidias::models::{Config, Error};
use phidias::{Model, WeightFormat};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Measures a model, or the machine.
pub fn bench(args: &Bench, global: &Global) -> Result<()> {
    let mut setup = Setup::new(global)?;
    setup.devices.prefer_cpu_for(args.kv, false);
    let machine = Machine::detect();
    let mut peaks = PeakOptions::thorough(&machine);
    if args.rough_peaks {
        peaks = PeakOptions::rough();
    }
    if args.peaks {
        return self::peaks(args, &setup, &machine, peaks);
    }
    if args.kernels {
        // What `auto` finds changes nothing here.
        #[cfg(feature = "cuda")]
        if matches!(global.device, Device::Cuda | Device::Host) {
            bail!(
                "--kernels: measures the kernels of the CPU (--device cpu); `cargo bench --features cuda --bench cuda` times those of a GPU"
            );
        }
        return kernels(args, &setup, &machine, peaks);
    }
    model(args, &setup, &machine, peaks)
}

fn told_by(steps: &Arc<Steps>) -> Progress {
    let steps = Arc::clone(steps);
    Arc::new(move |step| steps.set(step.what, step.done, step.total))
}

// ---- a model -------------------------------------------------------------------------------------

fn model(args: &Bench, setup: &Setup, machine: &Machine, peaks: PeakOptions) -> Result<()> {
    let threads = match args.threads.as_slice() {
        [] => vec![machine.threads()],
        asked => asked.to_vec(),
    };
    let conditions = Conditions {
        // Known when the model is open.
        name: String::new(),
        repetitions: args.repetitions,
        threads,
        kv_type: args.kv,
        kernels: setup.kernels,
        cancel: setup.cancel.clone(),
    };
    if let Some(file) = &args.image {
        return picture(args, setup, conditions, peaks, file);
    }
    let mut bench = ModelBench {
        conditions: conditions.clone(),
        tests: tests(args)?,
        peaks,
    };
    let mut lookup = LookupBench {
        conditions,
        lookups: args.lookup.clone(),
    };
    let stats = args.statistics.stats;
    let (name, model) = open(args, setup, |name, config, folder| {
        stats::check(stats, config, name)?;
        bench.check(config).map_err(BenchError::from)?;
        if let Some(folder) = folder.filter(|_| !args.lookup.is_empty()) {
            let tokenizer = Tokenizer::open(folder).map_err(Error::from)?;
            lookup.check(config, tokenizer.as_ref(), folder)?;
        }
        Ok(())
    })?;
    (bench.conditions.name, lookup.conditions.name) = (name.clone(), name);
    let weights = model.weight_bytes().all;
    let device = device::of(&model);
    if let Some(device) = &device {
        setup.console.note(device);
        // Its speed does not depend on them.
        bench.conditions.threads.truncate(1);
        lookup.conditions.threads.truncate(1);
    }
    let cache = machine.last_cache.filter(|c| *c > weights / 2);
    if let Some(cache) = cache.filter(|_| device.is_none()) {
        setup.console.note(format_args!(
            "the weights ({}) are no larger than twice the last cache ({}): decode is not limited by memory, and its share of the bandwidth says little",
            Size(weights),
            Size(cache)
        ));
    }
    let steps = Arc::new(setup.console.steps());
    let mut table = Table::default();
    if !bench.tests.is_empty() {
        let told = told_by(&steps);
        bench.run(&model, &told, |record| -> Result<()> {
            let cells = cells(&record);
            let record = WithRouting {
                routing: stats.map(|_| routing(&record.routing)),
                record,
            };
            steps.suspend(|| {
                table.record(args, &record, &cells)?;
                if let Some(routing) = record.routing.filter(|_| !args.json) {
                    say(routing);
                }
                Ok(())
            })
        })?;
    }
    if !args.lookup.is_empty() {
        table.end(args)?;
        lookup.run(&model, &told_by(&steps), |record| {
            steps.suspend(|| table.record(args, &record, &lookup_cells(&record)))
        })?;
    }
    Ok(())
}

/// A record, and what `--stats` adds.
#[derive(Serialize)]
struct WithRouting {
    #[serde(flatten)]
    record: Record,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<Value>,
}

fn picture(
    args: &Bench,
    setup: &Setup,
    conditions: Conditions,
    peaks: PeakOptions,
    file: &Path,
) -> Result<()> {
    // Before weights are drawn for it.
    Picture::open(file).map_err(Error::from)?;
    let (name, model) = open(args, setup, |_, _, _| Ok(()))?;
    let (_, own) = model.vision()?;
    let processor = match args.num_crops {
        Some(crops) => own.clone().with_num_crops(crops)?,
        None => own.clone(),
    };
    let bench = PictureBench {
        conditions: Conditions { name, ..conditions },
        peaks,
    };
    let steps = Arc::new(setup.console.steps());
    let mut table = Table::default();
    bench.run(&model, file, &processor, &told_by(&steps), |record| {
        steps.suspend(|| table.record(args, &record, &picture_cells(&record)))
    })
}

/// For each depth: the prompts, then the answers. None when only lookup is asked for.
fn tests(args: &Bench) -> Result<Vec<Test>> {
    let (mut prompt, mut new) = (args.prompt.clone(), args.new.clone());
    if prompt.is_empty() && new.is_empty() {
        if args.lookup.is_empty() {
            (prompt, new) = (vec![512], vec![128]);
        } else if args.depth != [0] {
            bail!("-d: --lookup has no depth; add tests that have one (-p, -n)");
        }
    }
    let mut tests = Vec::new();
    for &depth in &args.depth {
        for (kind, counts) in [(Kind::Prefill, &prompt), (Kind::Decode, &new)] {
            tests.extend(counts.iter().map(|&tokens| Test {
                kind,
                tokens,
                depth,
            }));
        }
    }
    Ok(tests)
}

/// The model and its name in the records. Its configuration, and its folder where one is given, are
/// checked before anything is written, quantized or measured.
fn open(
    args: &Bench,
    setup: &Setup,
    check: impl Fn(&str, &Config, Option<&Path>) -> Result<()>,
) -> Result<(String, Arc<Model>)> {
    let Some(preset) = &args.synth else {
        let origin = setup.locate(args.model.as_deref())?;
        let name = args.model.as_deref().unwrap_or("fable (built in)");
        check(name, &open_source(&origin)?.config, origin.folder())?;
        let model = setup.open(&origin, args.format)?;
        return Ok((name.to_owned(), model));
    };
    let name = preset;
    let preset: Preset = preset.parse()?;
    check(name, &preset.configuration(args.layers)?, None)?;
    let format = args.format.unwrap_or(WeightFormat::Q4);
    let folder = synthetic(setup, preset, args.layers, format)?;
    let model = setup.open(&Origin::Folder(folder), Some(format))?;
    let name = match args.layers {
        Some(layers) if layers < preset.layers() => {
            format!(
                "{preset} (synthetic, {layers} of {} layers)",
                preset.layers()
            )
        }
        _ => format!("{preset} (synthetic)"),
    };
    Ok((name, model))
}

/// The folder of a preset, written where it is not there yet.
fn synthetic(
    setup: &Setup,
    preset: Preset,
    layers: Option<usize>,
    format: WeightFormat,
) -> Result<PathBuf> {
    let layers = layers.unwrap_or(preset.layers());
    let folder = cache_folder()
        .unwrap_or_else(|| std::env::temp_dir().join("phidias"))
        .join("synth")
        .join(format!("{preset}-{layers}-{format}-v{PACKED_VERSION}"));
    if folder.is_dir() {
        return Ok(folder);
    }
    let mut bar = setup.console.bar("drawing weights", Unit::Bytes);
    let mut progress = |done: usize, total: usize| bar.set(done as u64, Some(total as u64));
    let options = SynthOptions {
        format,
        layers: Some(layers),
        threads: setup.threads,
        cancel: setup.cancel.clone(),
        progress: Some(&mut progress),
        ..SynthOptions::default()
    };
    match synthesize(preset, &folder, options) {
        // Another process was faster.
        Err(Error::Exists { .. }) if folder.is_dir() => {}
        other => other?,
    }
    setup.console.note(format_args!(
        "synthetic weights kept in {}",
        folder.display()
    ));
    Ok(folder)
}

/// A table, row by row; the columns are wide enough for what usually stands in them.
#[derive(Default)]
struct Table {
    begun: bool,
}

/// Head, width, text.
type Cell = (&'static str, usize, String);

impl Table {
    /// Writes a row, or the whole record as JSON.
    fn record(&mut self, args: &Bench, record: &impl Serialize, cells: &[Cell]) -> Result<()> {
        let mut out = Stdout;
        if args.json {
            writeln!(out, "{}", serde_json::to_string(record)?)?;
            return Ok(());
        }
        if !self.begun {
            self.begun = true;
            write_row(&mut out, cells.iter().map(|(head, w, _)| (*head, *w)))?;
            let lines: Vec<_> = cells.iter().map(|(_, w, _)| "-".repeat(*w)).collect();
            write_row(&mut out, lines.iter().map(|l| (l.as_str(), l.len())))?;
        }
        write_row(
            &mut out,
            cells.iter().map(|(_, w, text)| (text.as_str(), *w)),
        )?;
        Ok(())
    }

    /// The next row begins another table.
    fn end(&mut self, args: &Bench) -> Result<()> {
        if std::mem::take(&mut self.begun) && !args.json {
            writeln!(Stdout)?;
        }
        Ok(())
    }
}

/// All rows have the same model.
fn model_cell(name: &str) -> Cell {
    let width = name.chars().count().max("model".len());
    ("model", width, name.to_owned())
}

fn speed_cell(rate: Spread) -> Cell {
    let speed = |v: f64| format!("{v:.*}", if v < 100.0 { 2 } else { 1 });
    let [median, min, max] = [rate.median, rate.min, rate.max].map(speed);
    (
        "tok/s median (min-max)",
        22,
        format!("{median} ({min}-{max})"),
    )
}

fn cells(r: &Record) -> [Cell; 12] {
    let test = Test {
        kind: r.kind,
        tokens: r.tokens,
        depth: r.depth,
    };
    let limit = match r.kind {
        Kind::Prefill => &r.peak_instruction,
        Kind::Decode => "read",
    };
    let share = format!("{:.1} % of {limit}", 100.0 * r.share_of_peak);
    let peaks = format!("{}, {:.0}", bandwidth(&r.peaks), r.peak_gop_s);
    [
        model_cell(&r.model),
        ("format", 6, r.format.to_owned()),
        ("kv", 4, r.kv.to_owned()),
        ("isa", 6, r.isa.to_owned()),
        ("threads", 7, r.threads.to_string()),
        ("test", 14, test.to_string()),
        speed_cell(r.tok_s),
        ("GB/s", 6, format!("{:.1}", r.gb_s)),
        ("Gop/s", 6, format!("{:.1}", r.gop_s)),
        ("share of peak", 26, share),
        ("peaks GB/s, Gop/s", 17, peaks),
        ("bound", 6, r.bound.to_string()),
    ]
}

fn lookup_cells(r: &LookupRecord) -> [Cell; 11] {
    let guesses = format!("{} of {}", r.accepted, r.proposed);
    [
        model_cell(&r.model),
        ("format", 6, r.format.to_owned()),
        ("kv", 4, r.kv.to_owned()),
        ("isa", 6, r.isa.to_owned()),
        ("threads", 7, r.threads.to_string()),
        ("text", 7, r.text.to_owned()),
        ("lookup", 6, r.lookup.to_string()),
        ("tokens a pass", 13, format!("{:.2}", r.tokens_per_pass)),
        ("guesses right", 13, guesses),
        speed_cell(r.tok_s),
        ("speedup", 7, format!("{:.2}", r.speedup)),
    ]
}

fn picture_cells(r: &PictureRecord) -> [Cell; 12] {
    let seconds = |s: Spread| format!("{:.3}", s.median);
    [
        model_cell(&r.model),
        ("format", 6, r.format.to_owned()),
        ("isa", 6, r.isa.to_owned()),
        ("threads", 7, r.threads.to_string()),
        ("crops", 5, r.crops.to_string()),
        ("tokens", 6, r.tokens.to_string()),
        ("decode s", 8, seconds(r.decode_s)),
        ("prepare s", 9, seconds(r.prepare_s)),
        ("encode s", 8, seconds(r.encode_s)),
        ("project s", 9, seconds(r.project_s)),
        ("Gop/s", 6, format!("{:.1}", r.gop_s)),
        (
            "share of peak",
            26,
            format!("{:.1} % of {}", 100.0 * r.share_of_peak, r.peak_instruction),
        ),
    ]
}

/// The read bandwidth, or where it was before and after when it moved by more than a tenth.
fn bandwidth(peaks: &Around) -> String {
    let (a, b) = (peaks.before.read_gb_s, peaks.after.read_gb_s);
    if (a - b).abs() > 0.1 * a.min(b) {
        format!("{a:.0} then {b:.0}")
    } else {
        format!("{:.1}", (a + b) / 2.0)
    }
}

fn write_row<'c>(
    out: &mut impl Write,
    cells: impl Iterator<Item = (&'c str, usize)>,
) -> io::Result<()> {
    for (text, width) in cells {
        write!(out, "| {text:width$} ")?;
    }
    writeln!(out, "|")
}

// ---- the kernels ---------------------------------------------------------------------------------

fn kernels(args: &Bench, setup: &Setup, machine: &Machine, peaks: PeakOptions) -> Result<()> {
    let counts = match args.threads.as_slice() {
        [] => vec![machine.threads()],
        asked => asked.to_vec(),
    };
    if args.plot.is_some() && counts.len() > 1 {
        bail!(
            "--plot: draws one number of threads, {} were given",
            counts.len()
        );
    }
    if let Some(file) = &args.plot {
        // Better now than after a minute of measuring.
        files::check_writable(file)?;
    }
    let steps = Arc::new(setup.console.steps());
    let cancel = setup.cancel.clone();
    let mut bench = KernelBench::new(setup.kernels, 1, peaks, machine.last_cache, cancel);
    for threads in counts {
        bench.threads = threads;
        let records = bench.run(&told_by(&steps))?;
        steps.suspend(|| write_kernels(&mut Stdout, args, &records))?;
        if let Some(file) = &args.plot {
            let picture =
                roofline::svg(&records).map_err(|e| anyhow!("{}: {e}", file.display()))?;
            files::write(file, picture.as_bytes()).with_context(|| file.display().to_string())?;
            steps.suspend(|| {
                setup
                    .console
                    .note(format_args!("drawn in {}", file.display()))
            });
        }
    }
    Ok(())
}

fn write_kernels(out: &mut impl Write, args: &Bench, records: &[KernelRecord]) -> Result<()> {
    if args.json {
        for record in records {
            writeln!(out, "{}", serde_json::to_string(record)?)?;
        }
        return Ok(());
    }
    let Some(first) = records.first() else {
        return Ok(());
    };
    let (table, threads) = (first.isa, plural(first.threads));
    write!(
        out,
        "{table} table, {threads}; read {:.1} GB/s",
        first.peak_gb_s
    )?;
    for roof in KernelRecord::roofs(records) {
        write!(out, ", {} {:.0} Gop/s", roof.instruction, roof.gop_s)?;
    }
    writeln!(out, " (mean of before and after)\n")?;
    let heads = [
        "kernel",
        "shape",
        "tokens",
        "time, us",
        "GB/s",
        "Gop/s",
        "ops/byte",
        "share of peak",
    ];
    const WIDTHS: [usize; 8] = [12, 27, 6, 10, 6, 7, 8, 26];
    write_row(out, heads.into_iter().zip(WIDTHS))?;
    let lines = WIDTHS.map(|w| "-".repeat(w));
    write_row(out, lines.iter().map(|l| (l.as_str(), l.len())))?;
    for r in records {
        let cells = [
            r.kernel.clone(),
            r.shape.clone(),
            r.tokens.to_string(),
            format!("{:.1}", 1e6 * r.seconds.median),
            format!("{:.1}", r.gb_s),
            format!("{:.1}", r.gop_s),
            format!("{:.2}", r.ops as f64 / r.bytes as f64),
            format!("{:.1} % of {}", 100.0 * r.share_of_peak, r.limit()),
        ];
        write_row(out, cells.iter().map(String::as_str).zip(WIDTHS))?;
    }
    if records.iter().any(|r| r.share_of_peak > 1.0) {
        writeln!(
            out,
            "\nAbove 100 % of memory: the activations of {} tokens lie in the caches.",
            records.iter().map(|r| r.tokens).max().unwrap_or(0)
        )?;
    }
    Ok(())
}

// ---- the machine ---------------------------------------------------------------------------------

fn peaks(args: &Bench, setup: &Setup, machine: &Machine, options: PeakOptions) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(device) = setup.devices.find(setup.console)? {
        let steps = Arc::new(setup.console.steps());
        let peaks = Peaks::of_device(&device, &options, &setup.cancel, |done, total| {
            steps.set("the device's limits", done, total);
        })
        .map_err(BenchError::from)?;
        drop(steps);
        let name = device.name();
        if args.json {
            let mut object = peaks_json(&peaks);
            object["device"] = json!(name);
            writeln!(Stdout, "{object}")?;
            return Ok(());
        }
        let what = format!("{name}: {}", how_measured(&peaks));
        return write_peaks(&mut Stdout, &what, &[(name, peaks)]);
    }
    let counts = match args.threads.as_slice() {
        [] if machine.threads() == 1 => vec![1],
        [] => vec![1, machine.threads()],
        asked => asked.to_vec(),
    };
    let steps = Arc::new(setup.console.steps());
    let mut all = Vec::new();
    for threads in counts {
        let pool = Pool::new(Some(threads))?;
        let what = format!("the machine's limits, {}", plural(threads));
        let peaks = Peaks::measure(&pool, &options, &setup.cancel, |done, total| {
            steps.set(&what, done, total);
        })
        .map_err(BenchError::from)?;
        if args.json {
            let mut object = peaks_json(&peaks);
            object["cpu"] = json!(cpu_name());
            object["last_cache_bytes"] = json!(machine.last_cache);
            steps.suspend(|| writeln!(Stdout, "{object}"))?;
        }
        all.push((plural(threads), peaks));
    }
    drop(steps);
    if let Some((_, first)) = all.first().filter(|_| !args.json) {
        let cache = match machine.last_cache {
            Some(bytes) => format!(", last cache {}", Size(bytes)),
            None => String::new(),
        };
        let cpu = cpu_name().unwrap_or_else(|| "this machine".to_owned());
        let what = format!("{cpu}: {}{cache}", how_measured(first));
        write_peaks(&mut Stdout, &what, &all)?;
    }
    Ok(())
}

fn plural(threads: usize) -> String {
    match threads {
        1 => "1 thread".to_owned(),
        n => format!("{n} threads"),
    }
}

fn peaks_json(peaks: &Peaks) -> Value {
    json!({
        "threads": peaks.threads,
        "read_gb_s": peaks.read_gb_s(),
        "int8_gop_s": peaks.gop_s(Number::Int8, None),
        "bf16_gop_s": peaks.gop_s(Number::Bf16, None),
        "f32_gop_s": peaks.gop_s(Number::F32, None),
        "buffer_bytes": peaks.buffer_bytes,
        "variants": { "read": peaks.read, "int8": peaks.int8, "bf16": peaks.bf16, "f32": peaks.f32 },
    })
}

fn how_measured(peaks: &Peaks) -> String {
    let read = Size(peaks.buffer_bytes);
    format!("median (min-max) of each; * the fastest; {read} read")
}

/// A row a variant, a column a number of threads or a device; the best variant of each limit is marked.
fn write_peaks(out: &mut impl Write, what: &str, all: &[(String, Peaks)]) -> Result<()> {
    let Some((_, first)) = all.first() else {
        bail!("no number of threads");
    };
    writeln!(out, "{what}\n")?;
    const NAME: usize = 28;
    const CELL: usize = 24;
    let row = |out: &mut _, name: &str, cells: &[String]| {
        let first = std::iter::once((name, NAME));
        write_row(out, first.chain(cells.iter().map(|c| (c.as_str(), CELL))))
    };
    let heads: Vec<_> = all.iter().map(|(name, _)| name.clone()).collect();
    row(out, "", &heads)?;
    row(out, &"-".repeat(NAME), &vec!["-".repeat(CELL); all.len()])?;
    let mut section = |title: &str, of: &dyn Fn(&Peaks) -> &[Peak]| {
        for (i, variant) in of(first).iter().enumerate() {
            let cells: Vec<_> = (all.iter())
                .map(|(_, p)| {
                    let peak = &of(p)[i];
                    let mark = if best(of(p)) == Some(peak) { "*" } else { "" };
                    let rate = peak.rate;
                    format!("{:.1} ({:.1}-{:.1}){mark}", rate.median, rate.min, rate.max)
                })
                .collect();
            row(out, &format!("{title}, {}", variant.variant), &cells)?;
        }
        io::Result::Ok(())
    };
    section("GB/s", &|p| &p.read)?;
    for number in Number::ALL {
        section("Gop/s", &|p| p.loops(number))?;
    }
    Ok(())
}
