//! Every source of kernels compiles for every generation of GPUs, and what comes out is as lean as it is
//! meant to be. It takes no GPU, only NVIDIA's compiler and, for the figures, its assembler; without them
//! the tests say loudly what they did not do.
#![cfg(feature = "cuda")]

use phidias_kernels::cuda::nvrtc::{self, Target};
use phidias_kernels::cuda::{DeviceError, Source};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// Compute capabilities, times 10: A100, L4 and the like, H100 and H200.
const CAPABILITIES: [u32; 3] = [80, 89, 90];

/// Registers of a multiprocessor, of which a block must find its own free.
const REGISTERS: u32 = 65536;

/// Written past the test harness, which swallows what a passing test prints.
fn skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "\n=== SKIPPED: {what} ===\n");
}

/// Whether the compiler is here.
fn compiler_is_here() -> bool {
    match nvrtc::find() {
        Ok(()) => true,
        Err(DeviceError::NoCompiler { library }) => {
            skipped(&format!(
                "CUDA kernels are not compiled, {library} is not here"
            ));
            false
        }
        Err(error) => panic!("{error}"),
    }
}

fn compile(source: Source, target: Target) -> Vec<u8> {
    nvrtc::compile(source, target).unwrap_or_else(|error| panic!("{error}"))
}

fn portable(source: Source, capability: u32) -> String {
    let text = String::from_utf8(compile(source, Target::Portable(capability))).expect("text");
    text.trim_end_matches('\0').to_owned()
}

#[test]
fn every_source_compiles_and_has_the_kernels_that_are_launched() {
    if !compiler_is_here() {
        return;
    }
    for &source in Source::ALL {
        for capability in CAPABILITIES {
            let machine = compile(source, Target::Machine(capability));
            assert!(machine.starts_with(b"\x7fELF"), "{}", source.file());
            let text = portable(source, capability);
            let entries: BTreeSet<_> = (text.split(".entry ").skip(1))
                .map(|rest| rest[..rest.find('(').expect("parameters")].trim())
                .collect();
            let listed: BTreeSet<_> = source.kernels().iter().copied().collect();
            assert_eq!(entries, listed, "kernels of {}", source.file());
        }
    }
}

#[test]
fn the_compiler_says_its_version() {
    if !compiler_is_here() {
        return;
    }
    let version = nvrtc::version().expect("a compiler that is here");
    let numbers: Vec<u32> = (version.split('.'))
        .map(|number| number.parse().expect("a number"))
        .collect();
    // The oldest that knows what the kernels use.
    assert!(numbers.len() == 2 && numbers[0] >= 12, "{version}");
}

/// A kernel that may begin while the one before ends waits for it before it touches memory, and not once later;
/// only weights come before: of a norm, and those that decoding streams, unless the kernel before says of which
/// expert they are: then that wait is the first of two. Memory that kernels write is not read through the
/// read-only path, of which loads might be moved before the wait. Before 9.0 nothing overlaps.
#[test]
fn kernels_that_overlap_wait_before_they_touch_memory() {
    if !compiler_is_here() {
        return;
    }
    const WAIT: &str = "griddepcontrol.wait;";
    const WRITES: [&str; 4] = ["st.global", "atom.", "\tred.", " red."];
    for &source in Source::ALL {
        let text = portable(source, 90);
        assert_eq!(
            text.contains("ld.global.nc"),
            source == Source::Peak,
            "{}",
            source.file()
        );
        for kernel in text.split(".entry ").skip(1) {
            let name = kernel.split('(').next().unwrap_or_default();
            let streams = source == Source::Linear && name.contains("_decode");
            let waits = usize::from(source.overlaps()) + usize::from(streams);
            let parts: Vec<_> = kernel.split(WAIT).collect();
            assert_eq!(parts.len(), waits + 1, "waits of {name}");
            let none_of = |part: &str, accesses: &[&str]| {
                for access in accesses {
                    assert!(!part.contains(access), "{name}: {access} before the wait");
                }
            };
            for before in &parts[..waits] {
                none_of(before, &WRITES);
            }
            if waits > 0 {
                none_of(parts[0], &["cp.async", "ret;"]);
                if !name.contains("_norm_") {
                    none_of(parts[0], &["ld.global"]);
                }
            }
        }
        assert!(
            !portable(source, 80).contains("griddepcontrol"),
            "{}",
            source.file()
        );
    }
}

/// What the assembler says of one kernel.
#[derive(Debug, PartialEq)]
struct Usage {
    kernel: String,
    registers: u32,
    spilled: u32,
    /// Bytes of local memory: arrays that did not fit into registers.
    stack: u32,
}

/// Reads what `ptxas -v` says.
fn usages(log: &str) -> Vec<Usage> {
    let mut usages = Vec::new();
    let number_before = |line: &str, unit: &str| -> Option<u32> {
        line[..line.find(unit)?]
            .split_whitespace()
            .last()?
            .parse()
            .ok()
    };
    let mut kernel = None;
    let (mut spilled, mut stack) = (0, 0);
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            kernel = name.split('\'').next().map(str::to_owned);
        } else if line.contains("bytes spill stores") {
            stack = number_before(line, "bytes stack frame").expect(line);
            spilled = number_before(line, "bytes spill stores").expect(line)
                + number_before(line, "bytes spill loads").expect(line);
        } else if line.contains("Used ")
            && let Some(kernel) = kernel.take()
        {
            let registers = number_before(line, "registers").expect(line);
            usages.push(Usage {
                kernel,
                registers,
                spilled,
                stack,
            });
        }
    }
    usages
}

#[test]
fn the_assemblers_figures_are_read() {
    let log = "ptxas info    : Compiling entry function 'one' for 'sm_90'\n\
        ptxas info    : Function properties for one\n    \
        8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
        ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem, 388 bytes cmem[0]\n";
    let want = Usage {
        kernel: "one".to_owned(),
        registers: 40,
        spilled: 16,
        stack: 8,
    };
    assert_eq!(usages(log), [want]);
}

/// The assembler: on the path, or in the toolkit that `CUDA_PATH` names.
fn assembler() -> Option<PathBuf> {
    let named =
        std::env::var_os("CUDA_PATH").map(|toolkit| PathBuf::from(toolkit).join("bin/ptxas"));
    let runs = |path: &PathBuf| {
        Command::new(path)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    [Some(PathBuf::from("ptxas")), named]
        .into_iter()
        .flatten()
        .find(runs)
}

#[test]
fn nothing_spills_and_blocks_find_their_registers() {
    if !compiler_is_here() {
        return;
    }
    let Some(assembler) = assembler() else {
        return skipped("registers of CUDA kernels are not counted, ptxas is not here");
    };
    let folder = tempfile::tempdir().expect("a folder");
    let mut table = String::new();
    for &source in Source::ALL {
        for capability in CAPABILITIES {
            let text = portable(source, capability);
            let path = folder.path().join("kernels.ptx");
            std::fs::write(&path, &text).expect("written");
            let output = Command::new(&assembler)
                .args(["-v", &format!("-arch=sm_{capability}"), "-o"])
                .arg(folder.path().join("kernels.cubin"))
                .arg(&path)
                .output()
                .expect("the assembler runs");
            let log =
                String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{}: {log}", source.file());
            let usages = usages(&log);
            assert_eq!(
                usages.len(),
                source.kernels().len(),
                "{}: {log}",
                source.file()
            );
            for usage in usages {
                let Usage {
                    kernel,
                    registers,
                    spilled,
                    stack,
                } = &usage;
                let threads = largest_block(&text, kernel);
                table += &format!(
                    "sm_{capability} {kernel}: {registers} registers, {threads} threads\n"
                );
                assert_eq!(
                    (*spilled, *stack),
                    (0, 0),
                    "sm_{capability} {kernel}: {usage:?}"
                );
                // They are given out to a warp in pieces of 8 a thread.
                let taken = registers.next_multiple_of(8) * threads;
                assert!(
                    taken <= REGISTERS,
                    "sm_{capability} {kernel}: {taken} registers a block"
                );
            }
        }
    }
    println!("{table}");
}

/// The threads that a kernel's `__launch_bounds__` allow a block.
fn largest_block(text: &str, kernel: &str) -> u32 {
    let entry = text.find(&format!(".entry {kernel}(")).expect(kernel);
    let head = &text[entry..][..text[entry..].find('{').expect("a body")];
    let (_, bounds) = head
        .split_once(".maxntid ")
        .unwrap_or_else(|| panic!("{kernel} has no __launch_bounds__"));
    let bounds = bounds.lines().next().expect("a line");
    bounds
        .split(',')
        .map(|n| n.trim().parse::<u32>().expect("a number"))
        .product()
}
