//! Where to fetch from, where to, and how patiently.

use super::HubError;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const ENDPOINT: &str = "https://huggingface.co";

/// Where to fetch from, where to, and how patiently.
#[derive(Clone)]
pub struct HubOptions {
    /// `http://` or `https://` address of the hub.
    pub endpoint: String,
    /// The cache: the folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Access token for private and gated models; sent to the endpoint and nobody else.
    pub token: Option<String>,
    /// Use the cache and make no connection.
    pub offline: bool,
    /// How often a transfer that broke off is taken up again, counted anew whenever bytes came.
    pub retries: u32,
    /// How long connecting, a response or the next bytes of a file may take. A transfer that moves
    /// may take any time in all.
    pub timeout: Duration,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "(not shown)"))
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl HubOptions {
    /// The public hub and this cache, without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: ENDPOINT.into(),
            cache: cache.into(),
            token: None,
            offline: false,
            retries: 5,
            timeout: Duration::from_secs(30),
        }
    }

    /// As the environment says, in the way of `huggingface_hub`: the endpoint from `HF_ENDPOINT`; the
    /// cache from `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `huggingface` in `XDG_CACHE_HOME` or in
    /// `~/.cache`; the token from `HF_TOKEN`, or the file `HF_TOKEN_PATH`, or `token` beside `hub`;
    /// offline with `HF_HUB_OFFLINE=1`. A variable that is empty counts as not set.
    ///
    /// # Errors
    /// When nothing says where the cache is.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_vars(|name| std::env::var_os(name), std::env::home_dir())
    }

    fn from_vars(
        var: impl Fn(&str) -> Option<OsString>,
        user: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| {
            let text = var(name)?.to_string_lossy().trim().to_string();
            Some(text).filter(|text| !text.is_empty())
        };
        let path = |name: &str| var(name).map(PathBuf::from);
        let home = path("HF_HOME").or_else(|| {
            path("XDG_CACHE_HOME")
                .or_else(|| user.map(|user| user.join(".cache")))
                .map(|cache| cache.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or(HubError::NoCache)?;
        let mut options = Self::new(cache);
        options.endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        options.token = text("HF_TOKEN")
            .or_else(|| Some(fs::read_to_string(token_file?).ok()?.trim().to_string()))
            .filter(|token| !token.is_empty());
        options.offline = text("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
        });
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_environment_decides_where_and_how() {
        let options = |vars: &[(&str, &str)], user: Option<&str>| {
            let find = |name: &str| {
                let value = vars.iter().find(|var| var.0 == name)?.1;
                Some(OsString::from(value))
            };
            HubOptions::from_vars(find, user.map(PathBuf::from))
        };
        let names =
            "HF_HOME HF_HUB_CACHE HF_ENDPOINT HF_TOKEN HF_TOKEN_PATH HF_HUB_OFFLINE XDG_CACHE_HOME";
        let empty: Vec<_> = names.split(' ').map(|name| (name, "")).collect();
        let plain = options(&empty, Some("/none")).unwrap();
        assert_eq!(plain.cache, Path::new("/none/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!((plain.token, plain.offline), (None, false));
        let xdg = options(&[("XDG_CACHE_HOME", "/x")], Some("/none")).unwrap();
        assert_eq!(xdg.cache, Path::new("/x/huggingface/hub"));

        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let path = home.path().to_str().unwrap();
        let full = [
            ("HF_HOME", path),
            ("HF_ENDPOINT", "http://localhost:1"),
            ("HF_HUB_OFFLINE", "1"),
            ("HF_TOKEN", " \n"),
        ];
        let set = options(&full, None).unwrap();
        assert_eq!(set.cache, home.path().join("hub"));
        assert_eq!(set.endpoint, "http://localhost:1");
        assert!(set.offline);
        assert!(!format!("{set:?}").contains("hf_file"));
        assert_eq!(set.token.as_deref(), Some("hf_file"));
        let set = options(&[("HF_TOKEN", "hf_var"), ("HF_HOME", path)], None).unwrap();
        assert_eq!(set.token.as_deref(), Some("hf_var"));
        let set = options(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", path)], None).unwrap();
        assert_eq!(set.cache, Path::new("/c"));
        assert!(matches!(options(&[], None), Err(HubError::NoCache)));
    }
}
