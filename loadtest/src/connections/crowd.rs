//! Connections that are in the way.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::overhead::{RawClient, completion};

/// Lets this process open as many files as its hard limit says, and returns how many those are.
pub(super) fn raise_file_limit() -> std::io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Open connections; closed when dropped.
pub(super) struct Crowd {
    to: SocketAddr,
    silent: Vec<TcpStream>,
    served: Vec<RawClient>,
}

impl Crowd {
    /// `count` connections, every other one served once.
    pub(super) fn idle(to: SocketAddr, count: usize) -> Result<Self, String> {
        let mut crowd = Self { to, silent: Vec::new(), served: Vec::new() };
        for index in 0..count {
            let failed = |e| format!("connection {index} of {count}: {e}");
            if index % 2 == 0 {
                crowd.silent.push(TcpStream::connect(to).map_err(failed)?);
                continue;
            }
            let mut client = RawClient::connect(to).map_err(failed)?;
            client.exchange(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").map_err(failed)?;
            client.forget();
            crowd.served.push(client);
        }
        Ok(crowd)
    }

    /// `count` more that ask for a stream of `tokens` and never read it.
    pub(super) fn add_deaf(&mut self, count: usize, tokens: usize) -> Result<(), String> {
        for _ in 0..count {
            let mut stream = TcpStream::connect(self.to).map_err(|e| e.to_string())?;
            stream.write_all(&completion(tokens, true)).map_err(|e| e.to_string())?;
            self.silent.push(stream);
        }
        Ok(())
    }
}
