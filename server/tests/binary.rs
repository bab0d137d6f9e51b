//! The program as an operator runs it: started, asked, stopped by a signal; and its mistakes' sentences.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};

fn rheostat(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rheostat"));
    command.args(args).env("RHEOSTAT_LOG", "error");
    command
}

/// Starts `serve` on ports that the system chooses and returns its HTTP address.
fn serve() -> (Child, String) {
    let mut child = rheostat(&["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("it says where it listens");
    let address = line.split("http://").nth(1).and_then(|rest| rest.split(' ').next());
    let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
    (child, address)
}

fn post(address: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("it listens");
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("written");
    stream
}

fn terminate(child: &Child) {
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()));
}

#[test]
fn a_fresh_start_streams_a_chat_and_a_signal_lets_it_finish() {
    let (mut child, address) = serve();
    let body = r#"{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "max_tokens": 48, "ignore_eos": true, "stream_options": {"include_usage": true}}"#;
    let mut stream = post(&address, "/v1/chat/completions", body);
    let mut first = [0u8; 512];
    let n = stream.read(&mut first).expect("the stream begins");
    terminate(&child);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the stream ends");
    let all = format!("{}{}", String::from_utf8_lossy(&first[..n]), String::from_utf8_lossy(&rest));
    assert!(all.contains("\"completion_tokens\":48") && all.contains("data: [DONE]"), "{all}");
    assert!(child.wait().expect("it ends").success());
}

fn fails(args: &[&str]) -> String {
    let Output { status, stderr, .. } = rheostat(args).output().expect("the program starts");
    assert_eq!(status.code(), Some(1));
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert_eq!(said.trim().lines().count(), 1, "one sentence: {said}");
    said
}

#[test]
fn mistakes_are_one_clear_sentence() {
    assert!(fails(&["pull", "smollm3"]).contains("smollm2-135m"));
    assert!(
        fails(&["serve", "--model", "/nowhere/model.gguf", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .contains("/nowhere/model.gguf")
    );
    assert!(fails(&["serve", "--config", "/nowhere.toml"]).contains("/nowhere.toml"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    assert!(fails(&["serve", "--http", &address]).contains(&address));
}
