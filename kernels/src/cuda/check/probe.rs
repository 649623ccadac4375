//! What the families take for granted: of every device, and of the host device, that it finds mistakes.

use super::{Random, each_device};
use crate::cuda::device::{Arg, Kernel, Launch, Source};
use crate::cuda::nvrtc::{self, Target};
use crate::cuda::{Device, DeviceError, HostDevice, Memory, Order, Span};
use bytemuck::Pod;
use phidias_quant::{bf16, f16};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};

/// The kernels of `probe.cu`.
pub(in crate::cuda) const KERNELS: &[&str] = &[
    "probe_convert",
    "probe_warp",
    "probe_mma_s8",
    "probe_mma_u8s8",
    "probe_mma_bf16",
    "probe_mma_f16",
    "probe_copy",
    "probe_count",
    "probe_no_barrier",
    "probe_no_wait",
    "probe_deadlock",
    "probe_outside",
];

fn launch(
    device: &Arc<dyn Device>,
    name: &'static str,
    (blocks, threads, shared): (u32, u32, usize),
    args: &[Arg],
) -> Result<(), DeviceError> {
    let kernel = Kernel {
        source: Source::Probe,
        name,
    };
    let launch = Launch {
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared,
    };
    // SAFETY: each test gives its kernel what it takes; the host device finds what is wrong on purpose.
    unsafe { device.launch(kernel, launch, args) }
}

fn on<T: Pod>(device: &Arc<dyn Device>, span: Span<'_, T>) -> Arg {
    span.on(&**device)
}

fn host(order: Order) -> Option<Arc<dyn Device>> {
    HostDevice::new(order)
        .ok()
        .map(|device| Arc::new(device) as _)
}

#[test]
fn the_probe_compiles_where_there_is_a_compiler() {
    if nvrtc::find().is_ok() {
        for capability in [80, 90] {
            let code = nvrtc::compile(Source::Probe, Target::Machine(capability));
            code.unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn halves_convert_as_on_the_cpu() {
    each_device(|device| {
        let mut random = Random(7);
        // All halves, then floats: every exponent, and the neighbourhood of ties.
        let halves = (0..=u32::from(u16::MAX)).collect::<Vec<_>>();
        let floats = (0..=u32::from(u16::MAX)).flat_map(|high| {
            let low = [
                0x8000,
                0x7FFF,
                0x8001,
                0x1000,
                0x0FFF,
                0x1001,
                random.bits() as u32 & 0xFFFF,
            ];
            low.map(|low| high << 16 | low)
        });
        let bits: Vec<u32> = halves.into_iter().chain(floats).collect();
        let n = bits.len();
        let there = Memory::from_slice(device, &bits)?;
        let [from_f16, from_bf16] = [Memory::new(device, 4 * n)?, Memory::new(device, 4 * n)?];
        let [to_f16, to_bf16] = [Memory::new(device, 2 * n)?, Memory::new(device, 2 * n)?];
        let args = [
            on(device, there.span::<u32>()),
            on(device, from_f16.span::<f32>()),
            on(device, from_bf16.span::<f32>()),
            on(device, to_f16.span::<u16>()),
            on(device, to_bf16.span::<u16>()),
            Arg::U32(n as u32),
        ];
        launch(
            device,
            "probe_convert",
            (n.div_ceil(256) as u32, 256, 0),
            &args,
        )?;
        let (from_f16, from_bf16) = (
            from_f16.span::<f32>().to_vec()?,
            from_bf16.span::<f32>().to_vec()?,
        );
        let (to_f16, to_bf16) = (
            to_f16.span::<u16>().to_vec()?,
            to_bf16.span::<u16>().to_vec()?,
        );
        for (i, bits) in bits.into_iter().enumerate() {
            let (half, float) = (bits as u16, f32::from_bits(bits));
            let (f, b) = (
                f16::from_bits(half).to_f32(),
                bf16::from_bits(half).to_f32(),
            );
            let same = |got: f32, want: f32| {
                got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
            };
            assert!(
                same(from_f16[i], f) && same(from_bf16[i], b),
                "{half:04x}: {} {}",
                from_f16[i],
                from_bf16[i]
            );
            if float.is_nan() {
                assert!(
                    f16::from_bits(to_f16[i]).is_nan() && bf16::from_bits(to_bf16[i]).is_nan(),
                    "{bits:08x}"
                );
            } else {
                let want = (
                    f16::from_f32(float).to_bits(),
                    bf16::from_f32(float).to_bits(),
                );
                assert_eq!((to_f16[i], to_bf16[i]), want, "{bits:08x}");
            }
        }
        Ok(())
    });
}

#[test]
fn lanes_of_a_warp_and_threads_of_a_block_meet() {
    each_device(|device| {
        // Whole numbers: sums are exact in any order.
        let x: Vec<f32> = (0..96).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        let there = Memory::from_slice(device, &x)?;
        let out = [(); 5].map(|()| Memory::new(device, 4 * 96));
        let [sum, largest, below, whole, next] = out;
        let (sum, largest, below, whole, next) = (sum?, largest?, below?, whole?, next?);
        let outs = [&sum, &largest, &below, &whole, &next].map(|m| on(device, m.span::<u32>()));
        let args: Vec<Arg> = [on(device, there.span::<f32>())]
            .into_iter()
            .chain(outs)
            .collect();
        launch(device, "probe_warp", (1, 96, 0), &args)?;
        let [sum, largest, whole, next] =
            [sum, largest, whole, next].map(|memory| memory.span::<f32>().to_vec());
        let (sum, largest, whole, next) = (sum?, largest?, whole?, next?);
        let below = below.span::<u32>().to_vec()?;
        for i in 0..96 {
            let warp = &x[i / 32 * 32..][..32];
            assert_eq!(sum[i], warp.iter().sum::<f32>());
            assert_eq!(largest[i], warp.iter().fold(f32::MIN, |m, v| m.max(*v)));
            assert_eq!(
                below[i],
                (0..32).fold(0, |bits, l| bits | u32::from(warp[l] < 0.0) << l)
            );
            assert_eq!(whole[i], x.iter().sum::<f32>());
            assert_eq!(next[i], warp[(i + 1) % 32]);
        }
        Ok(())
    });
}

/// Words of 16 rows of `a` and 8 of `b`, what a value in them is, and what the product must be.
fn multiplied<T: Pod + PartialEq + std::fmt::Debug>(
    device: &Arc<dyn Device>,
    name: &'static str,
    (a, b): (&[u32], &[u32]),
    d: &[T],
    want: &[T],
) -> Result<(), DeviceError> {
    let (a, b, d) = (
        Memory::from_slice(device, a)?,
        Memory::from_slice(device, b)?,
        Memory::from_slice(device, d)?,
    );
    let args = [
        on(device, a.span::<u32>()),
        on(device, b.span::<u32>()),
        on(device, d.span::<T>()),
    ];
    launch(device, name, (1, 32, 0), &args)?;
    assert_eq!(d.span::<T>().to_vec()?, want, "{name}");
    Ok(())
}

#[test]
fn matrix_products_of_a_warp_take_the_fragments_that_are_written_down() {
    each_device(|device| {
        let mut random = Random(8);
        let bytes =
            |random: &mut Random, n| -> Vec<u8> { (0..n).map(|_| random.bits() as u8).collect() };
        let (a, b) = (bytes(&mut random, 16 * 32), bytes(&mut random, 8 * 32));
        let words = |bytes: &[u8]| -> Vec<u32> { bytemuck::pod_collect_to_vec(bytes) };
        let start: Vec<i32> = (0..128).map(|i| i * 1000 - 64000).collect();
        for (name, signed) in [("probe_mma_s8", true), ("probe_mma_u8s8", false)] {
            let value = |v: u8| {
                if signed {
                    i32::from(v as i8)
                } else {
                    i32::from(v)
                }
            };
            let want: Vec<i32> = (0..128)
                .map(|i| {
                    let (row, column) = (&a[i / 8 * 32..][..32], &b[i % 8 * 32..][..32]);
                    let products = row
                        .iter()
                        .zip(column)
                        .map(|(a, b)| value(*a) * i32::from(*b as i8));
                    start[i] + products.sum::<i32>()
                })
                .collect();
            multiplied(device, name, (&words(&a), &words(&b)), &start, &want)?;
        }
        // Small whole numbers, exact in either format.
        let number = |v: &u8| f32::from(v % 17) - 8.0;
        let (a, b) = (&a[..16 * 16], &b[..8 * 16]);
        let start: Vec<f32> = (0..128).map(|i| i as f32 - 64.0).collect();
        let want: Vec<f32> = (0..128)
            .map(|i| {
                let (row, column) = (&a[i / 8 * 16..][..16], &b[i % 8 * 16..][..16]);
                start[i]
                    + row
                        .iter()
                        .zip(column)
                        .map(|(a, b)| number(a) * number(b))
                        .sum::<f32>()
            })
            .collect();
        type Round = fn(f32) -> u16;
        let halves = |bytes: &[u8], round: Round| -> Vec<u32> {
            let halves: Vec<u16> = bytes.iter().map(|v| round(number(v))).collect();
            bytemuck::pod_collect_to_vec(&halves)
        };
        let bf16: Round = |v| bf16::from_f32(v).to_bits();
        let f16: Round = |v| f16::from_f32(v).to_bits();
        for (name, round) in [("probe_mma_bf16", bf16), ("probe_mma_f16", f16)] {
            let words = (&halves(a, round)[..], &halves(b, round)[..]);
            multiplied(device, name, words, &start, &want)?;
        }
        Ok(())
    });
}

#[test]
fn copies_to_shared_memory_arrive() {
    each_device(|device| {
        let (threads, steps) = (64, 5);
        let values: Vec<u32> = (0..threads * steps * 4).collect();
        let from = Memory::from_slice(device, &values)?;
        let to = Memory::new(device, values.len() * 4)?;
        let args = [
            on(device, from.span::<u32>()),
            on(device, to.span::<u32>()),
            Arg::U32(steps),
        ];
        launch(
            device,
            "probe_copy",
            (1, threads, 2 * 16 * threads as usize),
            &args,
        )?;
        assert_eq!(to.span::<u32>().to_vec()?, values);
        Ok(())
    });
}

#[test]
fn what_is_recorded_is_done_when_it_is_replayed() {
    each_device(|device| {
        let (n, copy) = (Memory::zeroed(device, 4)?, Memory::zeroed(device, 4)?);
        let value = |memory: &Memory| memory.span::<u32>().to_vec().map(|v| v[0]);
        let count = |by| {
            launch(
                device,
                "probe_count",
                (1, 64, 0),
                &[on(device, n.span::<u32>()), Arg::U32(by)],
            )
        };
        let recording = device.record(&mut || {
            count(3)?;
            n.span::<u32>().copy_to(copy.span())
        })?;
        assert_eq!(
            (value(&n)?, value(&copy)?),
            (0, 0),
            "recording does nothing"
        );
        recording.replay()?;
        recording.replay()?;
        assert_eq!((value(&n)?, value(&copy)?), (6, 6));
        count(1)?;
        recording.replay()?;
        assert_eq!(
            (value(&n)?, value(&copy)?),
            (10, 10),
            "in the order of the queue"
        );
        // What gives results cannot be recorded, and what fails leaves the device as it was.
        let refused = [
            device.record(&mut || value(&n).map(|_| ())),
            device.record(&mut || n.span::<u32>().upload(&[1])),
            device.record(&mut || Memory::new(device, 4).map(|_| ())),
            device.record(&mut || device.synchronize()),
            device.record(&mut || device.record(&mut || Ok(())).map(|_| ())),
            device.record(&mut || recording.replay()),
            device.record(&mut || device.seconds(&mut || Ok(())).map(|_| ())),
        ];
        for refused in refused {
            assert!(
                matches!(refused, Err(DeviceError::Recording { .. })),
                "{refused:?}"
            );
        }
        assert_eq!(value(&n)?, 10);
        assert!(device.seconds(&mut || count(1))? >= 0.0);
        assert_eq!(value(&n)?, 11);
        Ok(())
    });
}

/// What other threads do meanwhile is done, and not recorded.
#[test]
fn a_recording_is_of_one_thread() {
    each_device(|device| {
        let count = |n: &Memory, by| {
            let args = [on(device, n.span::<u32>()), Arg::U32(by)];
            launch(device, "probe_count", (1, 64, 0), &args)
        };
        let value = |memory: &Memory| memory.span::<u32>().to_vec().map(|v| v[0]);
        let [one, other] = [Memory::zeroed(device, 4)?, Memory::zeroed(device, 4)?];
        let (started, mut meanwhile) = (Barrier::new(2), Ok(()));
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| {
                started.wait();
                for i in 1..=200 {
                    count(&other, 1)?;
                    assert_eq!(value(&other)?, i, "done when it is read");
                    drop(Memory::from_slice(device, &[i])?);
                }
                Ok(())
            });
            started.wait();
            for i in 1..=20 {
                let recording = device.record(&mut || (0..8).try_for_each(|_| count(&one, 1)))?;
                recording.replay()?;
                assert_eq!(value(&one)?, 8 * i, "what this thread launched");
            }
            meanwhile = beside.join().expect("the other thread");
            Ok::<_, DeviceError>(())
        })?;
        meanwhile
    });
}

#[test]
fn work_that_panics_ends_its_recording() {
    each_device(|device| {
        let n = Memory::zeroed(device, 4)?;
        let count = |by| {
            let args = [on(device, n.span::<u32>()), Arg::U32(by)];
            launch(device, "probe_count", (1, 64, 0), &args)
        };
        let work = || {
            device.record(&mut || {
                count(1)?;
                panic!("on purpose")
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
        count(2)?;
        device.record(&mut || count(4))?.replay()?;
        assert_eq!(n.span::<u32>().to_vec()?, [6]);
        Ok(())
    });
}

#[test]
fn memory_of_a_recording_stays_until_it_is_dropped() {
    each_device(|device| {
        let before = device.free_memory()?;
        let bytes = 64 << 20;
        let memory = Memory::zeroed(device, bytes)?;
        let recording = device.record(&mut || memory.span::<u8>().zero())?;
        let taken = device.free_memory()?;
        assert!(taken + bytes <= before, "{taken} of {before}");
        drop(memory);
        assert!(device.free_memory()? <= taken, "kept");
        recording.replay()?;
        device.synchronize()?;
        drop(recording);
        assert!(device.free_memory()? >= taken + bytes / 2, "given back");
        Ok(())
    });
}

#[test]
fn too_much_memory_is_refused_with_numbers() {
    each_device(|device| {
        let (asked, total) = (1 << 50, device.limits().memory);
        match Memory::new(device, asked) {
            Err(error @ DeviceError::OutOfMemory { free, .. }) => {
                let want = format!(
                    "out of device memory: {asked} bytes asked for, {free} of {total} are free"
                );
                assert_eq!(error.to_string(), want);
            }
            other => panic!("{other:?}"),
        }
        Ok(())
    });
}

#[test]
fn a_refused_launch_names_the_kernel() {
    each_device(|device| {
        let n = Memory::zeroed(device, 4)?;
        let args = [on(device, n.span::<u32>()), Arg::U32(1)];
        let too_much = device.limits().shared + 1;
        for (blocks, threads, shared) in [(0, 64, 0), (1, 0, 0), (1, 2048, 0), (1, 64, too_much)] {
            let error = launch(device, "probe_count", (blocks, threads, shared), &args)
                .expect_err("too much");
            assert!(
                error.to_string().starts_with("kernel probe_count: "),
                "{error}"
            );
        }
        assert!(launch(device, "not_there", (1, 1, 0), &args).is_err());
        assert_eq!(n.span::<u32>().to_vec()?, [0]);
        Ok(())
    });
}

/// What each order gives.
fn in_every_order(
    run: impl Fn(&Arc<dyn Device>) -> Result<Vec<u32>, DeviceError>,
) -> Option<Vec<Vec<u32>>> {
    let orders = Order::ALL.into_iter().filter_map(host);
    let results: Vec<_> = orders
        .map(|device| run(&device).expect("it runs"))
        .collect();
    (!results.is_empty()).then_some(results)
}

#[test]
fn the_host_device_shows_a_missing_barrier_and_a_missing_wait() {
    let results = in_every_order(|device| {
        let y = Memory::zeroed(device, 4 * 64)?;
        launch(
            device,
            "probe_no_barrier",
            (1, 64, 0),
            &[on(device, y.span::<u32>())],
        )?;
        y.span::<u32>().to_vec()
    });
    if let Some(results) = results {
        assert_ne!(results[0], results[1]);
    }
    let values: Vec<u32> = (0..64 * 4).collect();
    let results = in_every_order(|device| {
        let (from, to) = (
            Memory::from_slice(device, &values)?,
            Memory::new(device, 16 * 64)?,
        );
        let args = [on(device, from.span::<u32>()), on(device, to.span::<u32>())];
        launch(device, "probe_no_wait", (1, 64, 16 * 64), &args)?;
        to.span::<u32>().to_vec()
    });
    for result in results.into_iter().flatten() {
        assert_ne!(result, values);
    }
}

#[test]
fn the_host_device_finds_deadlocks_writes_outside_and_wrong_arguments() {
    let Some(device) = host(Order::Forward) else {
        return;
    };
    let y = Memory::zeroed(&device, 12).expect("memory");
    let at = on(&device, y.span::<u32>());
    let reason = |name, args: &[Arg]| {
        let error = launch(&device, name, (1, 32, 0), args).expect_err(name);
        error.to_string()
    };
    let deadlock = reason("probe_deadlock", &[at]);
    assert_eq!(
        deadlock,
        "kernel probe_deadlock: threads wait at a barrier for ever in block 0, 0, 0"
    );
    // The next launch is not disturbed.
    launch(&device, "probe_count", (1, 32, 0), &[at, Arg::U32(2)]).expect("it runs");
    assert_eq!(y.span::<u32>().to_vec().expect("there"), [2, 0, 0]);
    for args in [&[at][..], &[at, Arg::I32(1)], &[at, Arg::U32(1), at]] {
        assert!(reason("probe_count", args).contains("takes arguments (pu)"));
    }
    let outside = reason("probe_outside", &[at, Arg::U32(3)]);
    assert_eq!(
        outside,
        "kernel probe_outside: wrote outside an allocation of 12 bytes"
    );
}

#[test]
#[should_panic(expected = "memory of")]
fn memory_of_another_device_is_not_taken() {
    match (host(Order::Forward), host(Order::Backward)) {
        (Some(one), Some(other)) => {
            let memory = Memory::new(&one, 4).expect("memory");
            let _ = on(&other, memory.span::<u32>());
        }
        _ => panic!("no compiler, so no memory of two devices"),
    }
}
