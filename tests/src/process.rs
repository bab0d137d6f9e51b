//! The real server as a process of its own, for what only signals can tell it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

/// A server process. Dropping it kills it.
pub struct ServerProcess {
    /// Address of the HTTP server.
    pub http: SocketAddr,
    /// Address of the gRPC server.
    pub grpc: SocketAddr,
    child: Child,
}

impl ServerProcess {
    /// Starts `binary serve` on ports that the system chooses, and waits until it says where it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(binary: &Path, flags: &[&str]) -> Self {
        let ports = ["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        let mut command = Command::new(binary);
        command.args(ports).args(flags).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the server's binary can be started");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let address = |scheme: &str| {
            let rest = line.split_once(scheme).map(|(_, rest)| rest);
            let word = rest.and_then(|rest| rest.split_whitespace().next());
            word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no {scheme} in {line:?}"))
        };
        Self { http: address("http://"), grpc: address("grpc://"), child }
    }

    /// Sends it a signal, `TERM` for example.
    ///
    /// # Panics
    /// When `kill` cannot be run.
    pub fn signal(&self, name: &str) {
        let killed = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(killed.expect("kill can be run").success());
    }

    /// Bytes of anonymous memory that are resident: what it has allocated and touched.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a figure");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().expect("it is ours")
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
