//! The bytes of a file, taken up again where they broke off.

use super::error::at;
use super::local::Local;
use super::remote::{Remote, header};
use super::{HubError, Progress};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

impl Remote<'_> {
    /// Fetches a file to `part`, continuing what is there, until it has its full size.
    pub(super) fn transfer(
        &self,
        local: &Local,
        url: &str,
        file: &str,
        size: Option<u64>,
        part: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let mut out = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(part)
            .map_err(at(part))?;
        let mut attempt = 0;
        loop {
            let before = out.metadata().map_err(at(part))?.len();
            let mut piece = Piece {
                file,
                size,
                part,
                out: &mut out,
                progress: &mut *progress,
            };
            match piece.fetch(self, local, url) {
                Ok(()) => break,
                Err(error @ (HubError::Interrupted { .. } | HubError::Unreachable { .. })) => {
                    let now = out.metadata().map_err(at(part))?.len();
                    attempt = if now > before { 1 } else { attempt + 1 };
                    if attempt > self.options.retries {
                        return Err(match error {
                            HubError::Unreachable { reason, .. } if now > 0 => {
                                HubError::Interrupted {
                                    file: file.into(),
                                    done: now,
                                    total: size,
                                    reason,
                                }
                            }
                            error => error,
                        });
                    }
                    std::thread::sleep(Duration::from_millis(250 << attempt.min(5)));
                }
                Err(error) => {
                    if out.metadata().is_ok_and(|here| here.len() == 0) {
                        let _ = fs::remove_file(part); // nothing to continue from
                    }
                    return Err(error);
                }
            }
        }
        // The rename must not be on the disk before the data.
        out.sync_data().map_err(at(part))
    }
}

/// One attempt at the rest of a file.
struct Piece<'a> {
    file: &'a str,
    size: Option<u64>,
    part: &'a Path,
    out: &'a mut File,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Piece<'_> {
    fn report(&mut self, done: u64) {
        (self.progress)(Progress {
            file: self.file,
            done,
            total: self.size,
        });
    }

    fn wrong(&self, expected: u64, found: u64) -> HubError {
        HubError::WrongSize {
            file: self.file.into(),
            expected,
            found,
        }
    }

    fn cut(&mut self, len: u64) -> Result<(), HubError> {
        self.out.set_len(len).map_err(at(self.part))
    }

    fn fetch(&mut self, remote: &Remote<'_>, local: &Local, url: &str) -> Result<(), HubError> {
        let mut done = self.out.metadata().map_err(at(self.part))?.len();
        if self.size.is_some_and(|size| done > size) {
            self.cut(0)?; // not the beginning of this file
            done = 0;
        }
        if self.size == Some(done) {
            self.report(done);
            return Ok(());
        }
        let reply = remote.send(url, Some(done).filter(|&done| done > 0), false)?;
        let response = reply.response;
        match response.status().as_u16() {
            200 => done = 0, // the whole file, whether or not a part was asked for
            206 => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                let (start, total) = parse_range(&range).ok_or_else(|| HubError::Response {
                    url: url.into(),
                    expected: "a Content-Range",
                    found: format!("{range:?}"),
                })?;
                if start != done {
                    return Err(HubError::Response {
                        url: url.into(),
                        expected: "the range that was asked for",
                        found: format!("{range:?} for a part from {done}"),
                    });
                }
                if let (Some(size), Some(total)) = (self.size, total)
                    && size != total
                {
                    return Err(self.wrong(size, total));
                }
            }
            416 if done > 0 => {
                self.cut(0)?; // not the beginning of this file either
                return Err(HubError::Interrupted {
                    file: self.file.into(),
                    done: 0,
                    total: self.size,
                    reason: "the server refused to continue the part that was here".into(),
                });
            }
            _ => return Err(remote.refusal(local, url, &response)),
        }
        let length =
            header(response.headers(), "content-length").and_then(|n| n.parse::<u64>().ok());
        let end = length.map(|length| done.saturating_add(length));
        if let (Some(size), Some(end)) = (self.size, end)
            && size != end
        {
            return Err(self.wrong(size, end));
        }
        let end = self.size.or(end);
        self.cut(done)?;
        self.out
            .seek(SeekFrom::Start(done))
            .map_err(at(self.part))?;
        self.report(done);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        let reason = loop {
            match body.read(&mut buffer) {
                Ok(0) => break None,
                Ok(n) => {
                    done += n as u64;
                    if let Some(end) = end.filter(|&end| done > end) {
                        self.cut(0)?;
                        return Err(self.wrong(end, done));
                    }
                    self.out.write_all(&buffer[..n]).map_err(at(self.part))?;
                    self.report(done);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error.to_string()),
            }
        };
        // Without a size from anywhere, an orderly end is all there is to go by.
        let complete = end.map_or(reason.is_none(), |end| done == end);
        if complete {
            return Ok(());
        }
        Err(HubError::Interrupted {
            file: self.file.into(),
            done,
            total: end,
            reason: reason.unwrap_or_else(|| "the server closed it".into()),
        })
    }
}

/// Start and total of `bytes 5-9/10`; the total may be `*`.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes",
            "bytes */10",
            "bytes 5/10",
            "5-9/10",
            "bytes a-9/10",
        ] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }
}
