//! The memory plan: what a model will take, compared with what there is, before it is taken.

use crate::machine::Machine;
use std::fmt;

/// Bytes of weights in mapped files that need not all be in memory: what is not at work may be dropped,
/// and the file has it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pageable {
    /// Experts: a token reads those it is given to.
    pub experts: usize,
    /// The embedding table: a token reads its row.
    pub embedding: usize,
    /// What looks at pictures, and is not read by tokens.
    pub encoder: usize,
}

impl Pageable {
    /// All bytes.
    #[must_use]
    pub fn all(&self) -> usize {
        self.experts + self.embedding + self.encoder
    }
}

/// Bytes that running a model takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights: pages of mapped files, or owned memory.
    pub weights: usize,
    /// Of `weights`: what need not all be in memory. It may be more than the memory; the disk is read then.
    pub pageable: Pageable,
    /// Of `pageable`: the experts of a token, the rows of a full context, and the encoder where it works
    /// while all else is held.
    pub working_set: usize,
    /// The KV cache when the context is full, without what is dropped.
    pub kv_cache: usize,
    /// What no later query sees of a full cache: as much could be dropped.
    pub hidden: usize,
    /// What is dropped of it.
    pub dropped: usize,
    /// Activations of the largest chunk.
    pub activations: usize,
    /// What kernels of many tokens keep, all threads together.
    pub scratch: usize,
    /// Of pictures: their features, and what the encoder works with beyond what the decoder gives up or
    /// has not taken yet.
    pub pictures: usize,
    /// Of passes that a device has recorded, at most.
    pub recordings: usize,
    /// Positions the cache was planned for.
    pub context: usize,
}

/// How a plan fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// All of it.
    Whole,
    /// All but the pageable weights that are not at work: the disk is read for them.
    WithDisk,
}

/// A plan that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// What was asked for.
    pub plan: MemoryPlan,
    /// Bytes this process can still take.
    pub available: u64,
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let available = usize::try_from(self.available).unwrap_or(usize::MAX);
        write!(
            f,
            "not enough memory: {}; {} can be had",
            self.plan,
            Size(available)
        )?;
        let rest = available.saturating_sub(self.plan.least().saturating_sub(self.plan.kv_cache));
        let per_position = self.plan.kv_cache / self.plan.context.max(1);
        match rest.checked_div(per_position) {
            Some(fits) if fits >= 256 => write!(f, "; a context of {} fits", fits / 256 * 256),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for DoesNotFit {}

impl MemoryPlan {
    /// All bytes.
    #[must_use]
    pub fn total(&self) -> usize {
        self.weights
            .saturating_add(self.kv_cache)
            .saturating_add(self.activations)
            .saturating_add(self.scratch)
            .saturating_add(self.pictures)
            .saturating_add(self.recordings)
    }

    /// The bytes without which no token can be computed at a reasonable speed: all but the pageable
    /// weights that are not at work.
    #[must_use]
    pub fn least(&self) -> usize {
        let rest = self.pageable.all().saturating_sub(self.working_set);
        self.total().saturating_sub(rest)
    }

    /// Compares the plan with the machine; a machine that does not tell is taken to be large enough.
    /// # Errors
    /// [`DoesNotFit`] with the numbers.
    pub fn check(&self, machine: &Machine) -> Result<Fit, DoesNotFit> {
        match machine.memory_available {
            Some(available) if self.least() as u64 > available => Err(DoesNotFit {
                plan: *self,
                available,
            }),
            Some(available) if self.total() as u64 > available => Ok(Fit::WithDisk),
            _ => Ok(Fit::Whole),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [weights, kv, activations] = [self.weights, self.kv_cache, self.activations].map(Size);
        write!(f, "weights {weights}")?;
        let Pageable {
            experts,
            embedding,
            encoder,
        } = self.pageable;
        let parts = [
            ("experts", experts),
            ("embedding", embedding),
            ("encoder", encoder),
        ];
        let parts = parts.into_iter().filter(|(_, bytes)| *bytes > 0);
        let parts: Vec<_> = parts
            .map(|(name, bytes)| format!("{name} {}", Size(bytes)))
            .collect();
        if !parts.is_empty() {
            write!(f, " (pageable: {})", parts.join(", "))?;
        }
        write!(f, " + KV cache {kv} (context {}", self.context)?;
        if self.dropped > 0 {
            write!(f, ", {} dropped", Size(self.dropped))?;
        }
        write!(f, ") + activations {activations}")?;
        if self.scratch > 0 {
            write!(f, " + scratch {}", Size(self.scratch))?;
        }
        if self.pictures > 0 {
            write!(f, " + pictures {}", Size(self.pictures))?;
        }
        if self.recordings > 0 {
            write!(f, " + recordings {}", Size(self.recordings))?;
        }
        write!(f, " = {}", Size(self.total()))?;
        if self.least() < self.total() {
            write!(f, ", at least {}", Size(self.least()))?;
        }
        Ok(())
    }
}

/// Bytes as people read them.
#[derive(Clone, Copy, Debug)]
pub struct Size(pub usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        for unit in ["B", "KiB", "MiB"] {
            if value < 1024.0 {
                let digits = usize::from(unit != "B" && value < 100.0);
                return write!(f, "{value:.digits$} {unit}");
            }
            value /= 1024.0;
        }
        write!(f, "{value:.2} GiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_with_the_numbers_and_says_what_fits() {
        let gib = 1usize << 30;
        let plan = MemoryPlan {
            weights: 2 * gib,
            kv_cache: 48 * gib,
            context: 131_072,
            ..MemoryPlan::default()
        };
        let machine = Machine {
            memory_available: Some(8 << 30),
            ..Machine::default()
        };
        let error = plan.check(&machine).unwrap_err().to_string();
        assert_eq!(
            error,
            "not enough memory: weights 2.00 GiB + KV cache 48.00 GiB (context 131072) + activations 0 B = 50.00 GiB; \
             8.00 GiB can be had; a context of 16384 fits"
        );
        assert_eq!(plan.check(&Machine::default()), Ok(Fit::Whole));
        let with_scratch = MemoryPlan {
            scratch: 3 << 20,
            ..plan
        };
        assert_eq!(with_scratch.total() - plan.total(), 3 << 20);
        let text = with_scratch.to_string();
        assert!(
            text.contains(" + activations 0 B + scratch 3.0 MiB = "),
            "{text}"
        );
        let dropping = MemoryPlan {
            kv_cache: 36 * gib,
            hidden: 12 * gib,
            dropped: 12 * gib,
            ..plan
        };
        assert_eq!(
            dropping.to_string(),
            "weights 2.00 GiB + KV cache 36.00 GiB (context 131072, 12.00 GiB dropped) + activations 0 B = 38.00 GiB"
        );
    }

    #[test]
    fn experts_may_stay_on_the_disk_and_nothing_else() {
        let gib = 1usize << 30;
        let plan = MemoryPlan {
            weights: 24 * gib,
            pageable: Pageable {
                experts: 22 * gib,
                ..Pageable::default()
            },
            working_set: 3 * gib,
            kv_cache: gib,
            context: 4096,
            ..MemoryPlan::default()
        };
        let with = |gib: u64| {
            plan.check(&Machine {
                memory_available: Some(gib << 30),
                ..Machine::default()
            })
        };
        assert_eq!(with(25), Ok(Fit::Whole));
        assert_eq!(with(24), Ok(Fit::WithDisk));
        assert_eq!(with(6), Ok(Fit::WithDisk));
        let error = with(5).unwrap_err().to_string();
        assert_eq!(
            error,
            "not enough memory: weights 24.00 GiB (pageable: experts 22.00 GiB) + KV cache 1.00 GiB \
             (context 4096) + activations 0 B = 25.00 GiB, at least 6.00 GiB; 5.00 GiB can be had"
        );
        let dense = MemoryPlan {
            pageable: Pageable::default(),
            working_set: 0,
            ..plan
        };
        assert_eq!(dense.least(), dense.total());
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (300 << 20, "300 MiB"),
            (3 << 29, "1.50 GiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
