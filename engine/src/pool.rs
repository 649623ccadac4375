//! The threads that compute.

use crate::machine::Machine;

/// More threads than this are taken for a slip of the hand.
pub const MAX_THREADS: usize = 1024;

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
/// Work is divided into contiguous ranges, one a thread, and no result depends on the division.
pub struct Pool {
    pool: rayon::ThreadPool,
    threads: usize,
}

impl Pool {
    /// A pool of `threads`, or of as many as this process can use.
    /// # Errors
    /// [`PoolError`].
    pub fn new(threads: Option<usize>) -> Result<Self, PoolError> {
        let threads = threads.unwrap_or_else(|| Machine::detect().threads().min(MAX_THREADS));
        if threads == 0 || threads > MAX_THREADS {
            return Err(PoolError::Count(threads));
        }
        let pool = (rayon::ThreadPoolBuilder::new())
            .num_threads(threads)
            .thread_name(|i| format!("phidias-{i}"))
            .build()?;
        Ok(Self { pool, threads })
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

    /// The part of `0..n` that thread `i` works on: contiguous, all within one of each other.
    #[must_use]
    pub fn share(&self, n: usize, i: usize) -> std::ops::Range<usize> {
        n * i / self.threads..n * (i + 1) / self.threads
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
    fn shares_cover_everything_once() {
        let pool = Pool::new(Some(3)).unwrap();
        for n in [0, 1, 2, 3, 7, 100] {
            let all: Vec<usize> = (0..3).flat_map(|i| pool.share(n, i)).collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn absurd_counts_are_refused() {
        for n in [0, MAX_THREADS + 1, usize::MAX] {
            assert!(matches!(Pool::new(Some(n)), Err(PoolError::Count(_))));
        }
    }
}
