//! Requests to the hub: addresses, redirects, and what its answers mean.

use super::local::Local;
use super::names::name_like;
use super::{HubError, HubOptions};
use hf_hub::{Repo, RepoType};
use ureq::http::uri::{Authority, Scheme};
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

const REDIRECTS: usize = 5;

/// What the hub says about a file before sending it.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub(super) commit: String,
    pub(super) etag: String,
    pub(super) size: Option<u64>,
}

/// A connection to the hub.
pub(super) struct Remote<'a> {
    pub(super) options: &'a HubOptions,
    endpoint: String,
    agent: Agent,
}

/// The end of a chain of redirects, and what the hub itself said on the way.
pub(super) struct Reply {
    pub(super) response: Response<Body>,
    commit: Option<String>,
    etag: Option<String>,
    size: Option<u64>,
}

impl<'a> Remote<'a> {
    pub(super) fn new(options: &'a HubOptions) -> Result<Self, HubError> {
        let endpoint = options.endpoint.trim_end_matches('/').to_string();
        let bad = || HubError::Endpoint {
            found: options.endpoint.clone(),
        };
        let uri: Uri = endpoint.parse().map_err(|_| bad())?;
        let host = uri.host().ok_or_else(bad)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad());
        }
        let token = options.token.as_deref().unwrap_or_default();
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(HubError::Token);
        }
        let wait = Some(options.timeout);
        let mut config = Agent::config_builder()
            .user_agent(concat!("phidias/", env!("CARGO_PKG_VERSION")))
            // Sizes are those of the files, not of something compressed on the way.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_send_request(wait)
            .timeout_recv_response(wait)
            .timeout_per_read(wait);
        let address = host.trim_start_matches('[').trim_end_matches(']');
        let loopback = address
            .parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        if loopback || host == "localhost" {
            config = config.proxy(None); // no proxy knows this machine by that name
        }
        Ok(Self {
            options,
            endpoint,
            agent: config.build().into(),
        })
    }

    pub(super) fn url(&self, local: &Local, revision: &str, file: &str) -> String {
        let repo = Repo::with_revision(local.id.clone(), RepoType::Model, revision.into());
        let (id, revision) = (repo.url(), repo.url_revision());
        format!("{}/{id}/resolve/{revision}/{file}", self.endpoint)
    }

    fn unreachable(&self, reason: impl ToString) -> HubError {
        HubError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason: reason.to_string(),
        }
    }

    /// Sends a request and follows redirects: with the token as long as they stay with the hub,
    /// without it beyond, and never from https to http. A `HEAD` stops at the door of the hub once
    /// it knows enough, because addresses of storage are often signed for `GET` only.
    pub(super) fn send(&self, url: &str, from: Option<u64>, head: bool) -> Result<Reply, HubError> {
        let bad = |url: &str, expected, found: String| HubError::Response {
            url: url.into(),
            expected,
            found,
        };
        let (mut commit, mut etag, mut size) = (None, None, None);
        let first: Uri = url
            .parse()
            .map_err(|_| bad(url, "an address", url.to_string()))?;
        let mut uri = first.clone();
        for _ in 0..=REDIRECTS {
            let at_hub = origin(&uri) == origin(&first);
            let mut request = if head {
                self.agent.head(&uri)
            } else {
                self.agent.get(&uri)
            };
            if let Some(token) = self.options.token.as_ref().filter(|_| at_hub) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(error))?;
            let headers = response.headers();
            if at_hub {
                commit = commit.or_else(|| header(headers, "x-repo-commit"));
                size = size.or_else(|| header(headers, "x-linked-size")?.parse().ok());
                etag = header(headers, "x-linked-etag").or(etag);
            }
            let done = |response| Reply {
                response,
                commit: commit.clone(),
                etag: etag.clone(),
                size,
            };
            let location =
                header(headers, "location").filter(|_| response.status().is_redirection());
            let Some(location) = location else {
                return Ok(done(response));
            };
            let to = redirected(&uri, &location)
                .ok_or_else(|| bad(url, "a redirect to a safe address", location))?;
            if head && origin(&to) != origin(&first) && etag.is_some() && size.is_some() {
                return Ok(done(response));
            }
            uri = to;
        }
        Err(bad(url, "at most 5 redirects", "more".into()))
    }

    /// Asks about a file; `None` if the repository has no such file.
    pub(super) fn metadata(
        &self,
        local: &Local,
        revision: &str,
        file: &str,
    ) -> Result<Option<Metadata>, HubError> {
        let url = self.url(local, revision, file);
        let reply = self.send(&url, None, true)?;
        let status = reply.response.status();
        if !status.is_success() && !status.is_redirection() {
            return match self.refusal(local, &url, &reply.response) {
                HubError::MissingFile { .. } => Ok(None),
                error => Err(error),
            };
        }
        let headers = reply.response.headers();
        let bad = |expected, found: Option<String>| HubError::Response {
            url: url.clone(),
            expected,
            found: found.unwrap_or_else(|| "none".into()),
        };
        // Both become names in the cache.
        let commit = reply.commit.filter(|commit| name_like(commit));
        let commit = commit.ok_or_else(|| bad("the header X-Repo-Commit with a commit", None))?;
        let etag = reply.etag.or_else(|| header(headers, "etag"));
        let name = etag.as_deref().map(|etag| {
            let etag = etag.strip_prefix("W/").unwrap_or(etag);
            etag.trim_matches('"').to_string()
        });
        let name = name
            .filter(|name| name_like(name) && name.len() <= 128)
            .ok_or_else(|| bad("an ETag of letters and digits", etag))?;
        let size = reply
            .size
            .or_else(|| header(headers, "content-length")?.parse().ok());
        Ok(Some(Metadata {
            commit,
            etag: name,
            size,
        }))
    }

    /// What a status that is no success means.
    pub(super) fn refusal(&self, local: &Local, url: &str, response: &Response<Body>) -> HubError {
        let status = response.status().as_u16();
        let code = header(response.headers(), "x-error-code").unwrap_or_default();
        let file = url.rsplit('/').next().unwrap_or_default();
        match (status, code.as_str()) {
            (404, "RepoNotFound") => HubError::NoRepository {
                endpoint: self.endpoint.clone(),
                id: local.id.clone(),
            },
            (404, "RevisionNotFound") => HubError::NoRevision {
                id: local.id.clone(),
                revision: local.revision.clone(),
            },
            (404, _) => HubError::MissingFile {
                id: local.id.clone(),
                revision: local.revision.clone(),
                file: file.into(),
            },
            (401 | 403, _) => HubError::Denied {
                endpoint: self.endpoint.clone(),
                id: local.id.clone(),
                status,
                token: self.options.token.is_some(),
            },
            (429 | 500..=599, _) => self.unreachable(format!("it answers with status {status}")),
            _ => HubError::Response {
                url: url.into(),
                expected: "status 200 or 206",
                found: format!("status {status}"),
            },
        }
    }
}

/// Scheme and host: who is talked to.
fn origin(uri: &Uri) -> (Option<Scheme>, Option<Authority>) {
    (uri.scheme().cloned(), uri.authority().cloned())
}

/// Where a redirect leads, by an address of its own or a path of the same host; never from https to http.
fn redirected(from: &Uri, location: &str) -> Option<Uri> {
    let to: Uri = if location.starts_with('/') && !location.starts_with("//") {
        let mut parts = from.clone().into_parts();
        parts.path_and_query = Some(location.parse().ok()?);
        Uri::from_parts(parts).ok()?
    } else {
        location.parse().ok()?
    };
    let secure = |uri: &Uri| uri.scheme_str() == Some("https");
    (to.host().is_some() && (secure(&to) || !secure(from))).then_some(to)
}

pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_string())
}
