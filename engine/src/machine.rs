//! What this process may use: cores and memory, as the affinity mask and the cgroup leave them.
//!
//! Taking the host's figures instead is a known trap: a container with two CPUs on a host of 64
//! runs 64 threads that are throttled against each other, and a plan that fits the host is killed
//! by the container's limit.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Cores and memory that this process may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Logical CPUs in the affinity mask.
    pub cpus: usize,
    /// Physical cores among them: hyperthreads of one core share its multipliers.
    pub cores: usize,
    /// Whole CPUs of the cgroup's quota, rounded down, at least 1.
    pub quota: Option<usize>,
    /// Bytes of memory that can still be taken, pages of files counted as free.
    pub memory_available: Option<u64>,
    /// Bytes of memory that this process could have at most: the machine's or the cgroup's.
    pub memory_total: Option<u64>,
    /// Bytes of the largest cache that a core reaches.
    pub last_cache: Option<usize>,
}

impl Machine {
    /// Looks at this machine.
    #[must_use]
    pub fn detect() -> Self {
        let mut machine = Self::read(Path::new("/"));
        if machine.cpus == 0 {
            // No /proc: the standard library knows the affinity mask of other systems.
            machine.cpus = std::thread::available_parallelism().map_or(1, usize::from);
            machine.cores = machine.cpus;
        }
        machine
    }

    /// Threads worth using: no more than cores, and than the quota pays for.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.cores.min(self.quota.unwrap_or(usize::MAX)).max(1)
    }

    /// Reads the files of Linux below `root` (`/`, or a copy in a test).
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let status = text("proc/self/status").unwrap_or_default();
        let allowed = (status.lines())
            .find_map(|l| l.strip_prefix("Cpus_allowed_list:"))
            .map(cpu_list)
            .unwrap_or_default();
        let cores: BTreeSet<usize> = (allowed.iter())
            .map(|cpu| {
                // The first sibling names the core; without topology each CPU counts as one.
                text(&format!(
                    "sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
                ))
                .and_then(|list| cpu_list(&list).first().copied())
                .unwrap_or(*cpu)
            })
            .collect();
        let groups = cgroups(root, text("proc/self/cgroup").unwrap_or_default().as_str());
        let meminfo = text("proc/meminfo").unwrap_or_default();
        let kib = |key: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(key))?;
            line.trim()
                .trim_end_matches("kB")
                .trim()
                .parse::<u64>()
                .ok()?
                .checked_mul(1024)
        };
        let (mut available, mut total) = (kib("MemAvailable:"), kib("MemTotal:"));
        for group in &groups {
            if let Some((limit, used)) = group.memory() {
                total = Some(total.map_or(limit, |t| t.min(limit)));
                let free = limit.saturating_sub(used);
                available = Some(available.map_or(free, |a| a.min(free)));
            }
        }
        Self {
            cpus: allowed.len(),
            cores: cores.len(),
            quota: groups.iter().filter_map(Group::quota).min(),
            memory_available: available,
            memory_total: total,
            last_cache: (allowed.first()).and_then(|cpu| largest_cache(root, *cpu)),
        }
    }
}

/// The largest cache of a CPU, of any level.
fn largest_cache(root: &Path, cpu: usize) -> Option<usize> {
    let size = |index: usize| {
        let path = format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}/size");
        let text = fs::read_to_string(root.join(path)).ok()?;
        let kib: usize = text.trim().strip_suffix('K')?.parse().ok()?;
        kib.checked_mul(1024)
    };
    (0..8).filter_map(size).max()
}

/// What the CPU calls itself, where the system tells.
#[must_use]
pub fn cpu_name() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("model name"))?;
    let name = line.trim_start().strip_prefix(':')?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// `0-3,8` as `[0, 1, 2, 3, 8]`; nonsense as nothing.
fn cpu_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        {
            cpus.extend(first..=last.min(first.saturating_add(1 << 16)));
        }
    }
    cpus
}

/// One cgroup folder that limits this process.
struct Group(PathBuf);

/// The folders of this process's cgroup and all above it: the tightest limit of them holds.
fn cgroups(root: &Path, own: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let base = root.join("sys/fs/cgroup");
        let base = match controllers {
            "" => base,
            c if c.split(',').any(|c| c == "cpu" || c == "memory") => base.join(c),
            _ => continue,
        };
        // Inside a container the path may be the host's; then only the mount's top exists.
        let mut path = Path::new(path.trim_start_matches('/')).to_owned();
        loop {
            let folder = base.join(&path);
            if folder.is_dir() {
                groups.push(Group(folder));
            }
            if !path.pop() {
                break;
            }
        }
    }
    groups
}

impl Group {
    /// Whole CPUs of the quota: version 2 `cpu.max`, version 1 `cpu.cfs_*_us`.
    fn quota(&self) -> Option<usize> {
        let read = |name: &str| fs::read_to_string(self.0.join(name)).ok();
        let (quota, period) = match read("cpu.max") {
            Some(line) => {
                let mut fields = line.split_whitespace().map(str::to_owned);
                (fields.next()?, fields.next()?)
            }
            None => (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
        };
        // "max" and -1 mean no limit.
        let (quota, period) = (
            quota.trim().parse::<u64>().ok()?,
            period.trim().parse::<u64>().ok()?,
        );
        Some(usize::try_from(quota.checked_div(period)?).ok()?.max(1))
    }

    /// Limit and use in bytes; pages of files do not count, they can be dropped.
    fn memory(&self) -> Option<(u64, u64)> {
        let read = |name: &str| fs::read_to_string(self.0.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
        let used = number("memory.current")
            .or_else(|| number("memory.usage_in_bytes"))
            .unwrap_or(0);
        let stat = read("memory.stat").unwrap_or_default();
        let files = (stat.lines())
            .filter_map(|l| l.strip_prefix("file ").or_else(|| l.strip_prefix("cache ")))
            .find_map(|v| v.trim().parse::<u64>().ok())
            .unwrap_or(0);
        Some((limit, used.saturating_sub(files)))
    }
}

/// Bytes that this user can still write on the file system that `folder`, which exists, is on.
/// `None`: it does not say, as some network and virtual ones.
#[must_use]
pub fn free_disk(folder: &Path) -> Option<u64> {
    let stats = fs4::statvfs(folder).ok()?;
    (stats.total_space() > 0).then(|| stats.available_space())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A host of four cores with two hyperthreads each, 64 GiB.
    fn host() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        put(
            dir.path(),
            "proc/self/status",
            "Name:\tx\nCpus_allowed_list:\t0-7\n",
        );
        put(
            dir.path(),
            "proc/meminfo",
            "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\n",
        );
        for cpu in 0..8 {
            let path = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            put(dir.path(), &path, &format!("{},{}\n", cpu % 4, cpu % 4 + 4));
        }
        dir
    }

    #[test]
    fn counts_cores_not_hyperthreads() {
        let dir = host();
        let machine = Machine::read(dir.path());
        assert_eq!(
            (
                machine.cpus,
                machine.cores,
                machine.quota,
                machine.threads()
            ),
            (8, 4, None, 4)
        );
        assert_eq!(machine.memory_available, Some(32 << 30));
    }

    #[test]
    fn finds_the_largest_cache() {
        let dir = host();
        assert_eq!(Machine::read(dir.path()).last_cache, None);
        for (index, size) in ["32K", "32K", "1024K", "32768K", "nonsense"]
            .iter()
            .enumerate()
        {
            let path = format!("sys/devices/system/cpu/cpu0/cache/index{index}/size");
            put(dir.path(), &path, size);
        }
        assert_eq!(Machine::read(dir.path()).last_cache, Some(32 << 20));
    }

    #[test]
    fn obeys_the_affinity_mask() {
        let dir = host();
        put(
            dir.path(),
            "proc/self/status",
            "Cpus_allowed_list:\t1,5-6\n",
        );
        assert_eq!(Machine::read(dir.path()).threads(), 2);
    }

    #[test]
    fn obeys_the_quota_of_cgroup_2_and_of_any_group_above() {
        let dir = host();
        put(dir.path(), "proc/self/cgroup", "0::/a/b\n");
        put(dir.path(), "sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
        put(dir.path(), "sys/fs/cgroup/a/cpu.max", "250000 100000\n");
        put(dir.path(), "sys/fs/cgroup/a/memory.max", "1073741824\n");
        put(dir.path(), "sys/fs/cgroup/a/memory.current", "734003200\n");
        put(
            dir.path(),
            "sys/fs/cgroup/a/memory.stat",
            "anon 1\nfile 524288000\n",
        );
        let machine = Machine::read(dir.path());
        assert_eq!((machine.quota, machine.threads()), (Some(2), 2));
        assert_eq!(machine.memory_total, Some(1 << 30));
        assert_eq!(
            machine.memory_available,
            Some((1 << 30) - 734_003_200 + 524_288_000)
        );
    }

    #[test]
    fn obeys_the_quota_of_cgroup_1_and_gives_at_least_one_thread() {
        let dir = host();
        put(
            dir.path(),
            "proc/self/cgroup",
            "4:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n",
        );
        put(
            dir.path(),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us",
            "50000\n",
        );
        put(
            dir.path(),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us",
            "100000\n",
        );
        put(
            dir.path(),
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "2147483648\n",
        );
        let machine = Machine::read(dir.path());
        assert_eq!((machine.quota, machine.threads()), (Some(1), 1));
        assert_eq!(machine.memory_total, Some(2 << 30));
    }

    #[test]
    fn an_empty_system_gives_one_thread() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Machine::read(dir.path()).threads(), 1);
        assert!(Machine::detect().threads() >= 1);
    }
}
