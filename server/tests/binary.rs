//! The program as an operator runs it: started, asked, stopped by a signal; and its mistakes' sentences.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};

use base64::Engine;

fn rheostat(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rheostat"));
    command.args(args).env("RHEOSTAT_LOG", "error");
    command
}

/// Starts `serve` on ports that the system chooses and returns its HTTP address.
fn serve(flags: &[&str]) -> (Child, String) {
    let ports = ["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let mut child =
        rheostat(&[&ports, flags].concat()).stdout(Stdio::piped()).spawn().expect("the program starts");
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
    let (mut child, address) = serve(&[]);
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

/// The most memory that a process has had, in bytes.
fn peak(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn images_that_would_take_all_memory_take_none() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../model-zoo/tests/fixtures");
    let (mut child, address) = serve(&["--model", &format!("{fixtures}/llava")]);
    let good = std::fs::read(format!("{fixtures}/images/rgb.png")).expect("a picture");
    let ask = |file: &[u8]| {
        let data = base64::engine::general_purpose::STANDARD.encode(file);
        let body = format!(
            r#"{{"max_tokens": 1, "messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,{data}"}}}}]}}]}}"#
        );
        let mut answer = String::new();
        post(&address, "/v1/chat/completions", &body).read_to_string(&mut answer).expect("an answer");
        answer
    };
    assert!(ask(&good).starts_with("HTTP/1.1 200"));
    let before = peak(&child);
    // 20,000 × 20,000 pixels would be 1.2 GB.
    for (width, height) in [(20_000u32, 20_000u32), (65_535, 65_535), (1, 16_777_216)] {
        let mut bomb = good.clone();
        bomb[16..20].copy_from_slice(&width.to_be_bytes());
        bomb[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        for _ in 0..8 {
            let answer = ask(&bomb);
            assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("pixels are taken"), "{answer}");
        }
    }
    let grown = peak(&child).saturating_sub(before);
    assert!(grown < 16 << 20, "refused images took {grown} bytes");
    assert!(ask(&good).starts_with("HTTP/1.1 200"), "the server goes on");
    terminate(&child);
    assert!(child.wait().expect("it ends").success());
}

/// PNG's checksum.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        let step = |crc: u32| if crc & 1 == 1 { 0xEDB8_8320 ^ (crc >> 1) } else { crc >> 1 };
        (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc))
    })
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
