//! Names from users and servers that become parts of paths and addresses.

use std::path::Path;

/// Whether `s` names a model on the hub rather than a folder: `org/name` in the hub's own rules, and
/// no file or folder of that name here.
pub fn is_model_id(s: &str) -> bool {
    legal_id(s) && !Path::new(s).exists()
}

/// The hub's rules: letters, digits, `-`, `_`, `.`; no `--` or `..`; no `-` or `.` at either end of a
/// part; at most 96 characters.
pub(super) fn legal_id(s: &str) -> bool {
    let part = |part: &str| {
        name_like(part)
            && !part.starts_with('-')
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    s.len() <= 96
        && s.split_once('/')
            .is_some_and(|(org, name)| part(org) && part(name))
}

/// Letters, digits, `-`, `_`, `.`, and no leading dot: safe as one component of a path and of a URL
/// on every system.
pub(super) fn name_like(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 255
        && !s.starts_with('.')
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Branches and tags may have several components (`refs/pr/1`).
pub(super) fn legal_revision(s: &str) -> bool {
    s.len() <= 255 && s.split('/').all(name_like)
}

pub(super) fn is_commit(s: &str) -> bool {
    s.len() == 40 && s.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn legal_shard(s: &str) -> bool {
    name_like(s) && s.ends_with(".safetensors") && s.len() > ".safetensors".len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids_follow_the_rules_of_the_hub() {
        for id in ["microsoft/Phi-3.5-mini-instruct", "a/b", "a_b/c.d-e"] {
            assert!(is_model_id(id), "{id}");
        }
        let long = format!("a/{}", "b".repeat(95));
        for id in [
            "", "a", "/", "a/", "/b", "a/b/c", "../b", "a/..", "./b", "a/.b", "a/b.", "-a/b",
            "a/b-", "a--x/b", "a/b..c", "a b/c", "a/b\\c", "a/b\0", "ä/b", "a/b:c", "a/b%2f",
            &long, // A folder of this package: a path, not a model.
            "src/hub",
        ] {
            assert!(!is_model_id(id), "{id}");
        }
    }

    #[test]
    fn revisions_and_shards_cannot_leave_their_folder() {
        for revision in ["main", "refs/pr/1", "v1.0_a-b"] {
            assert!(legal_revision(revision), "{revision}");
        }
        for revision in [
            "", "/", "a//b", "..", "a/../b", "/a", "a/", ".a", "a b", "a\\b", "a?b",
        ] {
            assert!(!legal_revision(revision), "{revision}");
        }
        assert!(legal_shard("model-00001-of-00002.safetensors"));
        for shard in [
            "../x.safetensors",
            "/x.safetensors",
            "a/x.safetensors",
            "a\\x.safetensors",
            "x.bin",
            ".safetensors",
            "..safetensors",
            "",
            "C:x.safetensors",
        ] {
            assert!(!legal_shard(shard), "{shard}");
        }
    }
}
