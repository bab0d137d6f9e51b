//! The hub source against a local stand-in that answers as the hub does: metadata of a one-byte range,
//! then ranges of the file.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

/// A hub with one repository of two files. Counts the requests for file contents.
struct StandIn {
    endpoint: String,
    served: Arc<Mutex<Vec<String>>>,
}

impl StandIn {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let served = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&served);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(|stream| stream.ok()) {
                answer(stream, &seen);
            }
        });
        Self { endpoint, served }
    }
}

fn answer(mut stream: TcpStream, served: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
    let mut lines = Vec::new();
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
        lines.push(std::mem::take(&mut line).trim().to_ascii_lowercase());
    }
    let Some(path) = lines.first().and_then(|first| first.split(' ').nth(1)) else { return };
    let content: &[u8] = match path {
        "/o/r/resolve/main/model.bin" => CONTENT,
        "/o/r/resolve/main/config.json" => b"{}",
        _ => {
            let _ =
                stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            return;
        }
    };
    let range = lines.iter().find_map(|line| line.strip_prefix("range: bytes="));
    let (start, end) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let start: usize = start.parse().expect("a range");
    let end = end.parse().map_or(content.len(), |end: usize| (end + 1).min(content.len()));
    if (start, end) != (0, 1) {
        served.lock().expect("unpoisoned").push(path.to_owned());
    }
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nconnection: close\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\netag: \"{}\"\r\nx-repo-commit: 0123456789012345678901234567890123456789\r\n\r\n",
        end - start,
        end - 1,
        content.len(),
        path.replace(['/', '.'], "")
    );
    let _ = stream.write_all(&[head.as_bytes(), &content[start..end]].concat());
}

fn hub_entry(file: &str, files: &str) -> Entry {
    let text = format!(
        "[[model]]\nname = \"h\"\n{file}\n[[model.source]]\nkind = \"hub\"\nrepo = \"o/r\"\nfiles = [{files}]\n"
    );
    parse(&text, Path::new("test")).expect("parses").remove(0)
}

#[test]
fn files_and_folders_come_from_the_hub_once() {
    let hub = StandIn::start();
    let cache = tempfile::tempdir().expect("a folder");
    let options = PullOptions {
        cache: cache.path().to_owned(),
        hub_endpoint: Some(hub.endpoint.clone()),
        ..PullOptions::default()
    };
    let sha = right_sha();
    let file = hub_entry(&format!("file = \"m.bin\"\nsha256 = \"{sha}\""), "\"model.bin\"");
    let path = pull(&file, &options).expect("pulled");
    assert_eq!(fs::read(&path).expect("readable"), CONTENT);
    assert_eq!(pull(&file, &options).expect("there"), path);
    assert_eq!(hub.served.lock().expect("unpoisoned").len(), 1);

    let folder = Entry { name: "folder".into(), ..hub_entry("", "\"config.json\", \"model.bin\"") };
    let path = pull(&folder, &options).expect("pulled");
    assert_eq!(fs::read(path.join("model.bin")).expect("readable"), CONTENT);
    assert_eq!(fs::read(path.join("config.json")).expect("readable"), b"{}");
}

#[test]
fn what_the_hub_lacks_or_gets_wrong_leaves_nothing() {
    let hub = StandIn::start();
    let cache = tempfile::tempdir().expect("a folder");
    let options = PullOptions {
        cache: cache.path().to_owned(),
        hub_endpoint: Some(hub.endpoint.clone()),
        ..PullOptions::default()
    };
    let missing = pull(&hub_entry("", "\"missing.bin\""), &options).expect_err("404").to_string();
    assert!(missing.contains("o/r/missing.bin") && missing.contains("404"), "{missing}");
    let wrong = hub_entry(&format!("file = \"m.bin\"\nsha256 = \"{}\"", "0".repeat(64)), "\"model.bin\"");
    let error = pull(&wrong, &options).expect_err("wrong hash").to_string();
    assert!(error.contains("SHA-256"), "{error}");
    assert!(!cache.path().join("models/h").exists());
    let nobody = PullOptions { hub_endpoint: Some("http://127.0.0.1:9".into()), ..options };
    let error = pull(&wrong, &nobody).expect_err("nobody listens").to_string();
    assert!(error.contains("o/r/model.bin could not be downloaded"), "{error}");
}
