//! The hub client against a small server in this process: what is fetched, what is resumed, what is
//! refused. Everything is passed explicitly, no environment variable is touched.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use phidias::hub::{HubError, HubOptions, Progress, fetch};
use tempfile::TempDir;

const ID: &str = "org/tiny";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server treats one file.
#[derive(Clone, Default)]
struct Served {
    bytes: Vec<u8>,
    /// Announce this size in `X-Linked-Size`.
    linked_size: Option<u64>,
    /// Close the connection after so many bytes of a body, this many times.
    cut_after: Option<usize>,
    cuts: usize,
    /// Say nothing for so long before that.
    stall: Duration,
    /// Send the body without `Content-Length`, ended by closing the connection.
    unsized_body: bool,
    /// Answer 200 with everything, whatever range is asked for.
    ignores_range: bool,
    /// Redirect to this address; the headers of the hub go with the redirect.
    redirect: Option<String>,
    etag: Option<String>,
}

#[derive(Clone, Debug)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Served>, // by path
    log: Vec<Asked>,
    status: Option<(u16, &'static str)>, // for everything
}

struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves these files of the model at `main` and at its commit.
    fn new(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let closing = Arc::new(AtomicBool::new(false));
        let (shared, stop) = (state.clone(), closing.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let _ = answer(&stream.unwrap(), &shared);
            }
        });
        let server = Self {
            address,
            state,
            closing,
            thread: Some(thread),
        };
        for (name, bytes) in files {
            server.serve(name, bytes.to_vec());
        }
        server
    }

    fn serve(&self, name: &str, bytes: Vec<u8>) {
        for revision in ["main", COMMIT] {
            self.change_at(revision, name, |served| served.bytes = bytes.clone());
        }
    }

    fn change(&self, name: &str, change: impl FnMut(&mut Served)) {
        self.change_at(COMMIT, name, change);
    }

    fn change_at(&self, revision: &str, name: &str, mut change: impl FnMut(&mut Served)) {
        let path = format!("/{ID}/resolve/{revision}/{name}");
        let mut state = self.state.lock().unwrap();
        change(state.files.entry(path).or_default());
    }

    fn log(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    fn options(&self, cache: &TempDir) -> HubOptions {
        HubOptions {
            endpoint: format!("http://{}", self.address),
            retries: 0,
            timeout: Duration::from_secs(5),
            ..HubOptions::new(cache.path())
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// One request, one response, one connection.
fn answer(stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ');
    let (method, path) = (words.next(), words.next());
    let (Some(method), Some(path)) = (method, path) else {
        return Ok(());
    };
    let mut headers = BTreeMap::new();
    for line in lines {
        match line?.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_string()),
            None => break,
        };
    }
    let mut out = stream;
    let (served, status) = {
        let mut state = state.lock().unwrap();
        state.log.push(Asked {
            method: method.into(),
            path: path.into(),
            headers: headers.clone(),
        });
        let status = state.status;
        let served = state.files.get_mut(path).map(|served| {
            let now = served.clone();
            if method == "GET" {
                served.cuts = served.cuts.saturating_sub(1);
            }
            now
        });
        (served, status)
    };
    if let Some((status, code)) = status {
        return write!(
            out,
            "HTTP/1.1 {status} X\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let Some(served) = served else {
        return write!(
            out,
            "HTTP/1.1 404 Not Found\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let total = served.bytes.len();
    let etag = served
        .etag
        .clone()
        .unwrap_or_else(|| format!("\"{}\"", digest(&served.bytes)));
    let mut head = format!("X-Repo-Commit: {COMMIT}\r\nETag: {etag}\r\nConnection: close\r\n");
    if let Some(size) = served.linked_size {
        head += &format!("X-Linked-Size: {size}\r\nX-Linked-Etag: {etag}\r\n");
    }
    if let Some(to) = &served.redirect {
        return write!(
            out,
            "HTTP/1.1 302 Found\r\n{head}Location: {to}\r\nContent-Length: 0\r\n\r\n"
        );
    }
    let range = headers.get("range").filter(|_| !served.ignores_range);
    let start = range.map_or(0, |range| {
        let range = range.strip_prefix("bytes=").unwrap();
        range.split('-').next().unwrap().parse::<usize>().unwrap()
    });
    if start > 0 && start >= total {
        return write!(
            out,
            "HTTP/1.1 416 X\r\n{head}Content-Range: bytes */{total}\r\nContent-Length: 0\r\n\r\n"
        );
    }
    let status = if range.is_some() {
        head += &format!("Content-Range: bytes {start}-{}/{total}\r\n", total - 1);
        "206 Partial Content"
    } else {
        "200 OK"
    };
    if !served.unsized_body {
        head += &format!("Content-Length: {}\r\n", total - start);
    }
    write!(out, "HTTP/1.1 {status}\r\n{head}\r\n")?;
    if method == "GET" {
        let end = match served.cut_after {
            Some(n) if served.cuts > 0 => total.min(start + n),
            _ => total,
        };
        out.write_all(&served.bytes[start..end])?;
        if end < total {
            std::thread::sleep(served.stall);
        }
    }
    out.flush()
}

/// A name for contents, of the form that git gives them (FNV-1a is enough for a test).
fn digest(bytes: &[u8]) -> String {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    format!("{:040x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

fn quiet(_: Progress<'_>) {}

/// A model of one file, 300 kB: more than one buffer.
fn weights() -> Vec<u8> {
    (0..300_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn small() -> Server {
    Server::new(&[
        ("config.json", b"{\"model_type\":\"phi3\"}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors", &weights()),
    ])
}

/// Paths below a folder, without lock files.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_none_or(|e| e != "lock") {
            found.push(path.display().to_string());
        }
    }
    found.sort();
    found
}

#[test]
fn a_whole_model_is_fetched_once_and_only_what_is_needed() {
    let server = small();
    server.serve("README.md", b"not needed".to_vec());
    let cache = TempDir::new().unwrap();
    let mut heard = BTreeMap::new();
    let folder = fetch(ID, None, &server.options(&cache), &mut |p| {
        let last = heard.insert(p.file.to_string(), (p.done, p.total));
        assert!(last.is_none_or(|last| last.0 <= p.done));
    })
    .unwrap();
    assert_eq!(
        folder,
        cache
            .path()
            .join("models--org--tiny/snapshots")
            .join(COMMIT)
    );
    let names: Vec<_> = files(&folder);
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(
        fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(heard["model.safetensors"], (300_000, Some(300_000)));
    let refs = cache.path().join("models--org--tiny/refs/main");
    assert_eq!(fs::read_to_string(refs).unwrap(), COMMIT);
    let log = server.log();
    assert!(
        log.iter()
            .all(|asked| !asked.headers.contains_key("authorization"))
    );
    assert!(
        log.iter()
            .all(|asked| asked.headers["accept-encoding"] == "identity")
    );

    // Again: one question, what `main` is today, and nothing is fetched.
    assert_eq!(
        fetch(ID, None, &server.options(&cache), &mut quiet).unwrap(),
        folder
    );
    let log = server.log();
    assert_eq!(log.len(), 1, "{log:?}");
    assert_eq!(
        (log[0].method.as_str(), log[0].path.as_str()),
        ("HEAD", "/org/tiny/resolve/main/config.json")
    );
    // By its commit: no question at all, for a commit cannot change.
    assert_eq!(
        fetch(ID, Some(COMMIT), &server.options(&cache), &mut quiet).unwrap(),
        folder
    );
    assert_eq!(server.log().len(), 0);
}

#[test]
fn an_interrupted_file_continues_where_it_stopped() {
    let server = small();
    server.change("model.safetensors", |served| {
        served.cut_after = Some(100_000);
        served.cuts = 1;
    });
    let cache = TempDir::new().unwrap();
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("model.safetensors: 100000 of 300000 bytes came"),
        "{text}"
    );
    let root = cache.path().join("models--org--tiny");
    assert!(
        !root
            .join("snapshots")
            .join(COMMIT)
            .join("model.safetensors")
            .exists()
    );
    assert!(!root.join("blobs").join(digest(&weights())).exists());
    assert!(!root.join("refs/main").exists());
    server.log();

    let mut first = None;
    let folder = fetch(ID, None, &server.options(&cache), &mut |p| {
        first.get_or_insert(p.done);
    })
    .unwrap();
    assert_eq!(first, Some(100_000));
    assert_eq!(
        fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    let gets: Vec<Asked> = server
        .log()
        .into_iter()
        .filter(|asked| asked.method == "GET")
        .collect();
    assert_eq!(gets.len(), 1, "{gets:?}");
    assert_eq!(gets[0].headers["range"], "bytes=100000-");
    assert!(!files(&root).iter().any(|file| file.ends_with(".part")));
}

#[test]
fn a_broken_connection_is_taken_up_again_in_the_same_call() {
    let server = small();
    server.change("model.safetensors", |served| {
        served.cut_after = Some(120_000);
        served.cuts = 2;
    });
    let cache = TempDir::new().unwrap();
    let options = HubOptions {
        retries: 1,
        ..server.options(&cache)
    };
    let folder = fetch(ID, None, &options, &mut quiet).unwrap();
    assert_eq!(
        fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    let ranges: Vec<_> = server
        .log()
        .into_iter()
        .filter_map(|asked| asked.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, ["bytes=120000-", "bytes=240000-"]);
}

#[test]
fn a_server_that_ignores_ranges_makes_no_mixture() {
    let server = small();
    server.change("model.safetensors", |served| {
        served.cut_after = Some(100_000);
        served.cuts = 1;
        served.ignores_range = true;
    });
    let cache = TempDir::new().unwrap();
    fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    let folder = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap();
    assert_eq!(
        fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
}

#[test]
fn sharded_models_come_with_every_shard() {
    let index = br#"{"metadata":{},"weight_map":{"a":"model-1-of-2.safetensors","b":"model-2-of-2.safetensors","c":"model-1-of-2.safetensors"}}"#;
    let server = Server::new(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-1-of-2.safetensors", b"one"),
        ("model-2-of-2.safetensors", b"two"),
    ]);
    let cache = TempDir::new().unwrap();
    let folder = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap();
    assert_eq!(
        fs::read(folder.join("model-2-of-2.safetensors")).unwrap(),
        b"two"
    );
    assert_eq!(files(&folder).len(), 4);

    // A shard that is not there is named before another one is fetched.
    server
        .state
        .lock()
        .unwrap()
        .files
        .retain(|path, _| !path.ends_with("model-2-of-2.safetensors"));
    let cache = TempDir::new().unwrap();
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    assert_eq!(
        error.to_string(),
        "org/tiny (revision main) has no model-2-of-2.safetensors"
    );
    let folder = cache
        .path()
        .join("models--org--tiny/snapshots")
        .join(COMMIT);
    assert!(!folder.join("model-1-of-2.safetensors").exists());
}

#[test]
fn missing_files_are_named_if_they_are_required() {
    let cache = TempDir::new().unwrap();
    let server = Server::new(&[("config.json", b"{}"), ("model.safetensors", b"w")]);
    // None of the optional ones is there, and that is fine.
    fetch(ID, None, &server.options(&cache), &mut quiet).unwrap();

    let cache = TempDir::new().unwrap();
    let server = Server::new(&[("model.safetensors", b"w")]);
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    assert_eq!(
        error.to_string(),
        "org/tiny (revision main) has no config.json"
    );

    let cache = TempDir::new().unwrap();
    let server = Server::new(&[("config.json", b"{}"), ("pytorch_model.bin", b"w")]);
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    assert_eq!(
        error.to_string(),
        "org/tiny (revision main) has no model.safetensors or model.safetensors.index.json"
    );
}

#[test]
fn a_file_of_the_wrong_size_is_refused_with_both_sizes() {
    // Announced longer than sent, announced shorter than sent; with and without a length of the body.
    for (linked, unsized_body) in [(400_000, false), (200_000, false), (200_000, true)] {
        let server = small();
        server.change("model.safetensors", |served| {
            served.linked_size = Some(linked);
            served.unsized_body = unsized_body;
        });
        let cache = TempDir::new().unwrap();
        let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
        let HubError::WrongSize {
            file,
            expected,
            found,
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!((file.as_str(), *expected), ("model.safetensors", linked));
        assert!(unsized_body || *found == 300_000);
        let text = error.to_string();
        assert!(
            text.contains(&format!("expected {linked} bytes, found {found}")),
            "{text}"
        );
        let left = files(&cache.path().join("models--org--tiny"));
        let name = digest(&weights());
        assert!(
            !left
                .iter()
                .any(|f| f.contains("model.safetensors") && !f.contains(".no_exist")),
            "{left:?}"
        );
        assert!(!left.iter().any(|f| f.contains(&name)), "{left:?}");
    }
    // Too short without a length looks like a broken connection: kept, to be continued.
    let server = small();
    server.change("model.safetensors", |served| {
        served.linked_size = Some(400_000);
        served.unsized_body = true;
    });
    let cache = TempDir::new().unwrap();
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("model.safetensors: 300000 of 400000 bytes"),
        "{text}"
    );
    let blob = cache
        .path()
        .join("models--org--tiny/blobs")
        .join(digest(&weights()));
    assert!(!blob.exists());
}

#[test]
fn a_revision_is_asked_for_and_remembered() {
    let server = small();
    server.change_at("refs%2Fpr%2F1", "config.json", |served| {
        served.bytes = b"{\"model_type\":\"phi3\"}".to_vec();
    });
    let cache = TempDir::new().unwrap();
    let options = server.options(&cache);
    fetch(ID, Some("refs/pr/1"), &options, &mut quiet).unwrap();
    assert_eq!(
        server.log()[0].path,
        "/org/tiny/resolve/refs%2Fpr%2F1/config.json"
    );
    let refs = cache.path().join("models--org--tiny/refs/refs/pr/1");
    assert_eq!(fs::read_to_string(refs).unwrap(), COMMIT);
    let offline = HubOptions {
        offline: true,
        ..options
    };
    fetch(ID, Some("refs/pr/1"), &offline, &mut quiet).unwrap();
    fetch(ID, Some("main"), &offline, &mut quiet).unwrap_err();
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects() {
    let server = small();
    let storage = Server::new(&[]);
    storage.state.lock().unwrap().files.insert(
        "/store/w?sig=1".into(),
        Served {
            bytes: weights(),
            ..Served::default()
        },
    );
    let to = format!("http://{}/store/w?sig=1", storage.address);
    server.change("model.safetensors", |served| {
        served.linked_size = Some(300_000);
        served.redirect = Some(to.clone());
    });
    // Within the hub, a redirect keeps the token.
    server.change("tokenizer.json", |served| {
        served.redirect = Some(format!("/{ID}/resolve/main/tokenizer.json"));
    });
    let cache = TempDir::new().unwrap();
    let options = HubOptions {
        token: Some("hf_secret".into()),
        ..server.options(&cache)
    };
    let folder = fetch(ID, None, &options, &mut quiet).unwrap();
    assert_eq!(
        fs::read(folder.join("model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), b"{}");
    let log = server.log();
    assert!(
        log.iter()
            .all(|asked| asked.headers["authorization"] == "Bearer hf_secret")
    );
    let log = storage.log();
    assert_eq!(log.len(), 1, "{log:?}"); // no HEAD: such addresses are signed for GET
    assert_eq!(log[0].method, "GET");
    assert!(!log[0].headers.contains_key("authorization"));
}

#[test]
fn redirects_without_end_are_refused() {
    let server = small();
    server.change("tokenizer.json", |served| {
        served.redirect = Some(format!("/{ID}/resolve/{COMMIT}/tokenizer.json"));
    });
    let cache = TempDir::new().unwrap();
    let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("expected at most 5 redirects, found more"),
        "{error}"
    );
}

#[test]
fn refusals_of_the_hub_are_told_apart() {
    let server = small();
    let cache = TempDir::new().unwrap();
    let options = server.options(&cache);
    let ask = |status, code| {
        server.state.lock().unwrap().status = Some((status, code));
        fetch(ID, None, &options, &mut quiet)
            .unwrap_err()
            .to_string()
    };
    let endpoint = &options.endpoint;
    assert_eq!(
        ask(404, "RepoNotFound"),
        format!("{endpoint} has no model org/tiny")
    );
    assert_eq!(
        ask(404, "RevisionNotFound"),
        "org/tiny has no revision main"
    );
    for status in [401, 403] {
        assert_eq!(
            ask(status, "GatedRepo"),
            format!(
                "{endpoint} denies access to org/tiny (status {status}): it does not exist, or is private or gated and HF_TOKEN is not set"
            )
        );
    }
    assert!(ask(503, "").starts_with(&format!(
        "cannot reach {endpoint} (it answers with status 503), and the cache"
    )));
    assert!(ask(418, "").contains("expected status 200 or 206, found status 418"));
}

#[test]
fn without_a_connection_the_cache_is_used_if_it_is_complete() {
    let server = small();
    let cache = TempDir::new().unwrap();
    let online = server.options(&cache);
    let offline = HubOptions {
        offline: true,
        ..online.clone()
    };
    let empty = fetch(ID, None, &offline, &mut quiet)
        .unwrap_err()
        .to_string();
    assert_eq!(
        empty,
        format!(
            "HF_HUB_OFFLINE is set, and the cache {} holds no complete copy of org/tiny (revision main, all of it is missing)",
            cache.path().display()
        )
    );
    let folder = fetch(ID, None, &online, &mut quiet).unwrap();
    server.log();
    assert_eq!(fetch(ID, None, &offline, &mut quiet).unwrap(), folder);
    assert_eq!(server.log().len(), 0);

    // Nobody listens any more: the same, after one attempt.
    drop(server);
    assert_eq!(fetch(ID, None, &online, &mut quiet).unwrap(), folder);
    // With a hole in the copy (the blob is gone, its link is not), one sentence says what and why.
    fs::remove_file(
        cache
            .path()
            .join("models--org--tiny/blobs")
            .join(digest(&weights())),
    )
    .unwrap();
    let error = fetch(ID, None, &online, &mut quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&format!("cannot reach {} (", online.endpoint)),
        "{error}"
    );
    assert!(
        error.ends_with("(revision main, model.safetensors is missing)"),
        "{error}"
    );
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = TempDir::new().unwrap();
    let options = HubOptions {
        endpoint: format!("http://{}", listener.local_addr().unwrap()),
        timeout: Duration::from_millis(300),
        ..HubOptions::new(cache.path())
    };
    let error = fetch(ID, None, &options, &mut quiet).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
}

#[test]
fn a_server_that_falls_silent_in_the_middle_is_given_up() {
    let server = small();
    server.change("model.safetensors", |served| {
        served.cut_after = Some(50_000);
        served.cuts = 1;
        served.stall = Duration::from_secs(2);
    });
    let cache = TempDir::new().unwrap();
    let options = HubOptions {
        timeout: Duration::from_millis(500),
        ..server.options(&cache)
    };
    let error = fetch(ID, None, &options, &mut quiet).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("model.safetensors: 50000 of 300000 bytes") && text.contains("timeout"),
        "{text}"
    );
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    for shard in [
        "../../evil.safetensors",
        "/tmp/evil.safetensors",
        "a\\\\b.safetensors",
        "x.bin",
        ".safetensors",
    ] {
        let index = format!(r#"{{"weight_map":{{"a":"{shard}"}}}}"#);
        let server = Server::new(&[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
        ]);
        let cache = TempDir::new().unwrap();
        let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
        assert!(matches!(error, HubError::ShardName { .. }), "{error}");
    }
    // So are ids, revisions, ETags and commits, which become file names too.
    let server = small();
    let cache = TempDir::new().unwrap();
    let options = server.options(&cache);
    let error = fetch("../etc", None, &options, &mut quiet).unwrap_err();
    assert!(matches!(error, HubError::Id { .. }), "{error}");
    let error = fetch(ID, Some("../../x"), &options, &mut quiet).unwrap_err();
    assert!(matches!(error, HubError::Revision { .. }), "{error}");
    assert_eq!(server.log().len(), 0);
    server.change("tokenizer.json", |served| {
        served.etag = Some("\"../../../evil\"".into())
    });
    let error = fetch(ID, None, &options, &mut quiet).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("expected an ETag of letters and digits, found \"../"),
        "{error}"
    );
}

#[test]
fn indices_that_are_none_are_refused() {
    for index in [
        "",
        "[]",
        "{}",
        r#"{"weight_map":{}}"#,
        r#"{"weight_map":{"a":1}}"#,
    ] {
        let server = Server::new(&[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
        ]);
        let cache = TempDir::new().unwrap();
        let error = fetch(ID, None, &server.options(&cache), &mut quiet).unwrap_err();
        assert!(
            matches!(error, HubError::Index { .. }),
            "{index:?}: {error}"
        );
    }
}

#[test]
fn endpoints_and_tokens_that_cannot_be_used_are_refused() {
    let cache = TempDir::new().unwrap();
    for endpoint in ["", "huggingface.co", "ftp://x", "http://"] {
        let options = HubOptions {
            endpoint: endpoint.into(),
            ..HubOptions::new(cache.path())
        };
        let error = fetch(ID, None, &options, &mut quiet).unwrap_err();
        assert!(
            matches!(error, HubError::Endpoint { .. }),
            "{endpoint:?}: {error}"
        );
    }
    let options = HubOptions {
        token: Some("a\nb".into()),
        ..HubOptions::new(cache.path())
    };
    let error = fetch(ID, None, &options, &mut quiet).unwrap_err();
    assert!(matches!(error, HubError::Token), "{error}");
}

#[test]
fn two_downloads_at_once_end_in_one_good_copy() {
    let server = small();
    let cache = TempDir::new().unwrap();
    let options = server.options(&cache);
    let run = || fetch(ID, None, &options, &mut quiet).unwrap();
    let folders = std::thread::scope(|scope| {
        let both = [scope.spawn(run), scope.spawn(run)];
        both.map(|thread| thread.join().unwrap())
    });
    assert_eq!(folders[0], folders[1]);
    assert_eq!(
        fs::read(folders[0].join("model.safetensors")).unwrap(),
        weights()
    );
}
