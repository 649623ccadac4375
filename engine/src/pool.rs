//! The threads that compute.

use crate::machine::Machine;
use phidias_kernels::view::ColsMut;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// More threads than this are taken for a slip of the hand.
pub const MAX_THREADS: usize = 1024;

/// Pieces of work for each thread: enough for threads that finish early to take over from those that are
/// late, few enough to keep each piece long.
pub const PIECES: usize = 32;

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A count that makes no sense.
    #[error("{0} threads: expected 1 to {MAX_THREADS}")]
    Count(usize),
    /// The system refused.
    #[error("cannot start the threads: {0}")]
    Start(#[from] rayon::ThreadPoolBuildError),
}

/// A fixed set of worker threads.
///
/// A forward pass enters the pool once and stays: one thread leads, runs the model, and hands out work
/// to all, itself included; the others wait for it at a barrier that spins briefly and then yields.
/// Everyone begins with a range of its own and takes from the others at the end, so that a thread that
/// the system takes away delays them by one piece and not by its whole share. No result depends on who computes what.
pub struct Pool {
    pool: rayon::ThreadPool,
    threads: usize,
}

impl Pool {
    /// A pool of `threads`, or of as many as this process can use.
    /// # Errors
    /// [`PoolError`].
    pub fn new(threads: Option<usize>) -> Result<Self, PoolError> {
        let threads = Self::threads_of(threads);
        if threads == 0 || threads > MAX_THREADS {
            return Err(PoolError::Count(threads));
        }
        let pool = (rayon::ThreadPoolBuilder::new())
            .num_threads(threads)
            .thread_name(|i| format!("phidias-{i}"))
            .build()?;
        Ok(Self { pool, threads })
    }

    /// Threads of a pool that is asked for so many, or for as many as are worth using.
    #[must_use]
    pub fn threads_of(asked: Option<usize>) -> usize {
        asked.unwrap_or_else(|| Machine::detect().threads().min(MAX_THREADS))
    }

    /// Number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` inside the pool; parallel iterators in it use these threads.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Runs `lead` on one thread of the pool, with the others at its service.
    /// # Panics
    /// When `lead` or a piece of its work does.
    pub fn enter<R: Send>(&self, lead: impl FnOnce(&Team<'_>) -> R + Send) -> R {
        let shared = Shared::default();
        let lead = Mutex::new(Some(lead));
        let results = self.pool.broadcast(|context| {
            if context.index() > 0 {
                shared.follow(context.index());
                return None;
            }
            // However the leader ends, the others must not wait for ever.
            let _end = End(&shared);
            let lead = lead.lock().unwrap_or_else(PoisonError::into_inner).take();
            let team = Team {
                shared: &shared,
                threads: self.threads,
                leader: PhantomData,
            };
            lead.map(|lead| lead(&team))
        });
        let result = results.into_iter().flatten().next();
        result.expect("the first thread leads")
    }
}

/// How the columns of a result are divided among threads.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'w> {
    /// Columns of each of the matrices that lie side by side in it.
    pub widths: &'w [usize],
    /// Where a matrix is cut: at multiples of this from its first column on.
    pub unit: usize,
    /// Most units that one call takes, at least 1.
    pub most: usize,
}

/// The threads of a pool that was entered, in the hands of the leader.
pub struct Team<'p> {
    shared: &'p Shared,
    threads: usize,
    /// Not to be shared: a piece of work cannot hand out work of its own.
    leader: PhantomData<Cell<()>>,
}

impl Team<'_> {
    /// Number of threads, the leader included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `work(i)` once for every `i` below `count`, on all threads, and returns when all is done.
    /// # Panics
    /// When `work` does.
    pub fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        self.ranges(count, 1, |range| range.for_each(&work));
    }

    /// Calls `work` with ranges that make up `0..count`, on all threads, and returns when all is done. Each
    /// is half of what a thread has left, but no more than `most`: the first ones are long, since work that
    /// waits for memory begins anew with each, and the last ones short, so that the threads end together.
    /// # Panics
    /// When `work` does.
    fn ranges(&self, count: usize, most: usize, work: impl Fn(Range<usize>) + Sync) {
        if count <= 1 || self.threads == 1 {
            return (0..count)
                .step_by(most)
                .for_each(|first| work(first..count.min(first.saturating_add(most))));
        }
        // Everyone has a range of its own, so that neighbouring pieces follow each other on one core; who
        // is through with it takes from the end of another's.
        let ranges: Vec<Line<AtomicU64>> = (0..self.threads)
            .map(|i| Line(AtomicU64::new(pack(self.share(count, i)))))
            .collect();
        let threads = self.threads;
        let size = |r: &Range<usize>| r.len().div_ceil(2).min(most);
        self.shared.run(threads, &|own| {
            let first = |r: Range<usize>| {
                let at = r.start + size(&r);
                (r.start..at, at..r.end)
            };
            let last = |r: Range<usize>| {
                let at = r.end - size(&r);
                (at..r.end, r.start..at)
            };
            while let Some(range) = take(&ranges[own].0, first) {
                work(range);
            }
            for other in (1..threads).map(|i| &ranges[(own + i) % threads].0) {
                while let Some(range) = take(other, last) {
                    work(range);
                }
            }
        });
    }

    /// Calls `work(i, columns, part)` for parts of `y`, on all threads, and returns when all is done: `part` is
    /// some columns of the `i`th of the matrices that lie side by side in it, see [`Cut`].
    /// # Panics
    /// When `work` does, or the widths are not those of `y`.
    pub fn columns(
        &self,
        y: ColsMut<'_>,
        cut: Cut<'_>,
        work: impl Fn(usize, Range<usize>, ColsMut<'_>) + Sync,
    ) {
        let Cut { widths, unit, most } = cut;
        let width: usize = widths.iter().sum();
        assert_eq!(width, y.cols(), "widths side by side, columns");
        let units = |width: usize| width.div_ceil(unit);
        let y = y.shared();
        self.ranges(widths.iter().map(|w| units(*w)).sum(), most, |range| {
            let (mut first, mut left) = (0, 0);
            for (i, &width) in widths.iter().enumerate() {
                let of = |unit_of: usize| (unit_of.saturating_sub(first) * unit).min(width);
                let cols = of(range.start)..of(range.end);
                if !cols.is_empty() {
                    #[allow(unsafe_code, reason = "which columns are whose is known here only")]
                    // SAFETY: the ranges of `Team::ranges` are disjoint, `of` does not descend, and the columns
                    // of a matrix are those of no other; so no two parts have one in common.
                    let part = unsafe { y.part(left + cols.start..left + cols.end) };
                    work(i, cols, part);
                }
                first += units(width);
                left += width;
            }
        });
    }

    /// The part of `0..n` that thread `i` begins with: contiguous, all within one of each other.
    fn share(&self, n: usize, i: usize) -> Range<usize> {
        n * i / self.threads..n * (i + 1) / self.threads
    }

    /// Calls `work` once with every part, on all threads, and returns when all is done.
    /// # Panics
    /// When `work` does.
    pub fn each_part<P: Send>(&self, parts: Vec<P>, work: impl Fn(P) + Sync) {
        if parts.len() <= 1 || self.threads == 1 {
            return parts.into_iter().for_each(work);
        }
        let parts: Vec<Mutex<Option<P>>> = parts.into_iter().map(|p| Mutex::new(Some(p))).collect();
        self.each(parts.len(), |i| {
            let part = parts[i]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            work(part.expect("every part is taken once"));
        });
    }

    /// Into how many pieces work that could be cut into `units` should be cut.
    #[must_use]
    pub fn pieces(&self, units: usize) -> usize {
        match self.threads {
            1 => 1,
            n => units.min(n * PIECES),
        }
    }
}

/// A range of pieces in one word, so that it changes in one step.
fn pack(range: Range<usize>) -> u64 {
    debug_assert!(range.end <= u32::MAX as usize);
    (range.start as u64) << 32 | range.end as u64
}

/// Takes some of a range that is not empty: `split` gives that and what is left.
fn take(
    range: &AtomicU64,
    split: impl Fn(Range<usize>) -> (Range<usize>, Range<usize>),
) -> Option<Range<usize>> {
    let mut seen = range.load(Ordering::Relaxed);
    loop {
        let now = (seen >> 32) as usize..seen as u32 as usize;
        if now.is_empty() {
            return None;
        }
        let (taken, left) = split(now);
        match range.compare_exchange_weak(seen, pack(left), Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return Some(taken),
            Err(changed) => seen = changed,
        }
    }
}

/// A value on a cache line of its own (two, since lines are fetched in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

/// The barrier at which followers wait for the leader, and the leader for them.
#[derive(Default)]
struct Shared {
    /// Counts the tasks; [`FINISHED`] ends the team.
    epoch: Line<AtomicUsize>,
    /// The task of this epoch.
    task: Mutex<Option<&'static Task<'static>>>,
    /// Followers that have not done with it.
    pending: Line<AtomicUsize>,
    /// Whether one of them panicked.
    panicked: AtomicBool,
}

/// Called by every thread with its index.
type Task<'t> = dyn Fn(usize) + Sync + 't;

const FINISHED: usize = usize::MAX;

/// Ends the team when the leader is through, or unwinds.
struct End<'s>(&'s Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.epoch.0.store(FINISHED, Ordering::Release);
    }
}

/// Waits until `done`: spinning first (a task takes microseconds, and waking a thread does too), then
/// letting others have the core.
fn wait(done: impl Fn() -> bool) {
    const SPINS: u32 = 2000;
    let mut spins = 0;
    while !done() {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

impl Shared {
    /// Has every thread call `task`.
    fn run(&self, threads: usize, task: &Task<'_>) {
        // Followers must be through with `task` before this returns or unwinds.
        struct Rest<'s>(&'s Shared);
        impl Drop for Rest<'_> {
            fn drop(&mut self) {
                wait(|| self.0.pending.0.load(Ordering::Acquire) == 0);
            }
        }
        #[allow(unsafe_code, reason = "a scoped borrow for threads that live longer")]
        // SAFETY: only the lifetime changes. Followers use the reference between the epoch's store
        // below and their decrement of `pending`, and `Rest` waits for all of them before `task` goes.
        let forever = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(forever);
        self.pending.0.store(threads - 1, Ordering::Relaxed);
        self.epoch.0.fetch_add(1, Ordering::Release);
        {
            let _rest = Rest(self);
            task(0);
        }
        assert!(
            !self.panicked.load(Ordering::Acquire),
            "a thread of the pool panicked"
        );
    }

    /// What all threads but the leader do.
    fn follow(&self, index: usize) {
        let mut seen = 0;
        loop {
            wait(|| self.epoch.0.load(Ordering::Acquire) != seen);
            seen = self.epoch.0.load(Ordering::Acquire);
            if seen == FINISHED {
                return;
            }
            let task = *self.task.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(task) = task
                && catch_unwind(AssertUnwindSafe(|| task(index))).is_err()
            {
                self.panicked.store(true, Ordering::Release);
            }
            self.pending.0.fetch_sub(1, Ordering::Release);
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} threads", self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_before_the_next_task() {
        // More threads than this machine may have cores.
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(Some(threads)).unwrap();
            for count in [0, 1, 2, 7, 100] {
                let sum = pool.enter(|team| {
                    let mut values = vec![0u32; count];
                    for round in 0..50 {
                        let parts = values.iter_mut().enumerate().collect();
                        team.each_part(parts, |(i, v)| *v += i as u32 + round);
                    }
                    let total = AtomicUsize::new(0);
                    team.each(count, |i| {
                        total.fetch_add(values[i] as usize, Ordering::Relaxed);
                    });
                    total.into_inner()
                });
                let want: usize = (0..count).map(|i| 50 * i + 50 * 49 / 2).sum();
                assert_eq!(sum, want, "{threads} threads, {count} pieces");
            }
        }
    }

    #[test]
    fn columns_side_by_side_are_each_computed_once() {
        for (threads, most) in [(1, 1), (1, usize::MAX), (2, 3), (3, usize::MAX), (8, 1)] {
            let pool = Pool::new(Some(threads)).unwrap();
            for widths in [&[][..], &[1], &[0, 5], &[16, 16], &[40, 3, 0, 100], &[1000]] {
                let (rows, cols) = (2, widths.iter().sum::<usize>());
                let mut values = vec![0.0; rows * cols];
                let cut = Cut {
                    widths,
                    unit: 16,
                    most,
                };
                pool.enter(|team| {
                    let y = ColsMut::new(&mut values, rows, cols);
                    team.columns(y, cut, |i, own, mut y| {
                        let whole = own.end.is_multiple_of(16) || own.end == widths[i];
                        assert!(own.start.is_multiple_of(16) && whole, "{own:?} of {i}");
                        assert!(own.len().div_ceil(16) <= most);
                        for row in 0..rows {
                            for (v, column) in y.row(row).iter_mut().zip(own.clone()) {
                                *v += (10_000 * i + 1000 * row + column + 1) as f32;
                            }
                        }
                    });
                });
                let want = (0..rows).flat_map(|row| {
                    let all = widths.iter().enumerate();
                    all.flat_map(move |(i, &width)| {
                        (0..width).map(move |column| 10_000 * i + 1000 * row + column + 1)
                    })
                });
                let want: Vec<f32> = want.map(|v| v as f32).collect();
                assert_eq!(values, want, "{threads} threads, {widths:?}");
            }
        }
    }

    #[test]
    fn ranges_halve_down_to_one() {
        let pool = Pool::new(Some(2)).unwrap();
        let seen = Mutex::new(Vec::new());
        pool.enter(|team| team.ranges(200, 64, |r| seen.lock().unwrap().push(r)));
        let mut seen = seen.into_inner().unwrap();
        seen.sort_by_key(|r| r.start);
        assert!(seen.windows(2).all(|w| w[0].end == w[1].start), "{seen:?}");
        assert_eq!((seen[0].clone(), seen.last().unwrap().end), (0..50, 200));
        assert!(seen.iter().any(|r| r.len() == 1), "{seen:?}");
    }

    #[test]
    fn a_panic_anywhere_comes_out_and_the_pool_lives_on() {
        let pool = Pool::new(Some(3)).unwrap();
        for bad in [0, 5, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.enter(|team| team.each(100, |i| assert!(i != bad, "piece {i}")));
            }));
            assert!(result.is_err());
        }
        let result = catch_unwind(AssertUnwindSafe(|| pool.enter(|_| panic!("leader"))));
        assert!(result.is_err());
        assert_eq!(pool.enter(|team| team.threads()), 3);
    }

    #[test]
    fn absurd_counts_are_refused() {
        for n in [0, MAX_THREADS + 1, usize::MAX] {
            assert!(matches!(Pool::new(Some(n)), Err(PoolError::Count(_))));
        }
    }
}
