//! Images of requests over an encoder that counts, and fetching against servers that misbehave.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

use model_zoo::vision::EncodedImage;
use model_zoo::vision::processor::ImageProcessor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::fetch::{FetchError, Resolve};
use super::guard::is_public;
use super::*;
use crate::energy::meter::{Meter, Reading};
use crate::energy::{EnergyConfig, Source};
use crate::telemetry::{MetricsCompat, ServedModel};

const TOKEN: u32 = 7;
const WHOLE: Encoding = Encoding { merge: None };
const PNG: &[u8] = include_bytes!("../../../model-zoo/tests/fixtures/images/rgb.png");
const JPEG: &[u8] = include_bytes!("../../../model-zoo/tests/fixtures/images/turned.jpg");

/// Two rows an image, its mean and its maximum.
#[derive(Debug, Default)]
struct Counting(Arc<AtomicUsize>);

impl ImageEncoder for Counting {
    fn encode(&mut self, pixels: &[f32], _: Encoding) -> model_zoo::Result<EncodedImage> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let mean = pixels.iter().sum::<f32>() / pixels.len() as f32;
        let rows = vec![mean, 0.0, pixels.iter().copied().fold(f32::MIN, f32::max), 0.0];
        Ok(EncodedImage { rows, ..EncodedImage::default() })
    }

    fn hidden_size(&self) -> usize {
        2
    }

    fn tokens_per_image(&self) -> usize {
        2
    }

    fn weight_bytes(&self) -> usize {
        0
    }
}

/// A meter that says a joule more at every reading.
struct Ticking(f64);

impl Meter for Ticking {
    fn source(&self) -> Source {
        Source::Rapl
    }

    fn read(&mut self) -> Reading {
        self.0 += 1.0;
        Reading { at: std::time::Instant::now(), joules: self.0, reset: false }
    }
}

/// Images over the counting encoder, its count, and the metrics.
fn images(limits: ImageLimits) -> (Images, Arc<AtomicUsize>, Arc<Metrics>) {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"size": 8, "crop_size": 8}"#;
    std::fs::write(folder.path().join("preprocessor_config.json"), config).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let vision = Vision {
        processor: ImageProcessor::from_folder(folder.path(), 8).unwrap(),
        encoder: Box::new(Counting(Arc::clone(&count))),
        image_token: TOKEN,
    };
    let metrics = Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
    let config = EnergyConfig { idle: Some(0.0), ..EnergyConfig::default() };
    let energy = Arc::new(Energy::new(Some(Box::new(Ticking(0.0))), &config, &metrics));
    (Images::new(Some(vision), limits, Arc::clone(&metrics), energy), count, metrics)
}

fn file(bytes: &[u8]) -> ImageSource {
    ImageSource::Bytes(bytes.to_vec())
}

fn data_url(bytes: &[u8]) -> ImageSource {
    use base64::Engine;
    let data = base64::engine::general_purpose::STANDARD.encode(bytes);
    ImageSource::Url(format!("data:image/png;base64,{data}"))
}

#[tokio::test]
async fn an_image_is_encoded_once_and_lies_where_its_token_stood() {
    let (images, count, metrics) = images(ImageLimits::default());
    let shown = images.embed(vec![file(PNG), data_url(JPEG), data_url(PNG)], WHOLE).await.unwrap();
    assert_eq!((shown.embeddings.len(), count.load(Ordering::Relaxed)), (3, 2));
    assert_eq!(shown.embeddings[0], shown.embeddings[2]);
    assert_ne!(shown.embeddings[0], shown.embeddings[1]);
    assert_eq!(shown.joules, Some(2.0), "a joule for each that was encoded");
    let again = images.embed(vec![file(PNG), data_url(JPEG)], WHOLE).await.unwrap();
    assert_eq!((again.joules, count.load(Ordering::Relaxed)), (Some(0.0), 2));
    let page = metrics.render();
    for line in [
        "rheostat_images_total{source=\"encoder\"} 2",
        "rheostat_images_total{source=\"cache\"} 3",
        "rheostat_image_cache_bytes 32",
        "rheostat_image_encode_seconds_count 2",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
    let (prompt, places) = images.place(vec![1, TOKEN, 2, TOKEN, TOKEN], &shown.embeddings).unwrap();
    assert_eq!(prompt, [1, TOKEN, TOKEN, 2, TOKEN, TOKEN, TOKEN, TOKEN]);
    assert_eq!(places.iter().map(|image| image.start).collect::<Vec<_>>(), [1, 4, 6]);
    assert!(places.iter().map(|image| &image.embeddings).eq(&shown.embeddings));
    for (prompt, shown) in [(vec![1, TOKEN], &shown.embeddings[..0]), (vec![1, 2], &shown.embeddings[..1])] {
        let error = images.place(prompt, shown).expect_err("places and images differ");
        assert!(error.message.contains("must not spell"), "{error}");
    }
    assert_eq!(images.place(vec![1, 2], &[]).unwrap(), (vec![1, 2], Arc::default()));
}

#[tokio::test]
async fn what_cannot_be_taken_is_refused_by_its_number_and_reason() {
    let limits = ImageLimits { max_bytes: 10_000, max_pixels: 5000, max_images: 2, ..ImageLimits::default() };
    let (images, count, _) = images(limits);
    let url = |url: &str| ImageSource::Url(url.into());
    for (sources, says) in [
        (vec![file(PNG), file(&PNG[..900])], "image 2 cannot be taken: it is damaged"),
        (vec![file(b"GIF89a")], "image 1 cannot be taken: it is not a PNG"),
        (vec![file(JPEG)], "90 × 60 pixels"),
        (vec![file(&[0; 10_001])], "10001 bytes; 10000 are allowed"),
        (vec![data_url(&[0; 20_000])], "10000 are allowed"),
        (vec![file(PNG), file(PNG), file(PNG)], "3 images; 2 are allowed"),
        (vec![url("https://images.example/a.png")], "images.fetch"),
        (vec![url("http://127.0.0.1/a.png")], "images.fetch"),
        (vec![url("file:///etc/passwd")], "file: URLs are not fetched"),
        (vec![url("no url at all")], "malformed"),
        (vec![url("data:image/png;base64,@")], "malformed"),
    ] {
        let error = images.embed(sources, WHOLE).await.expect_err(says);
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::InvalidArgument, Some("messages")));
        assert!(error.message.contains(says), "{error} does not say {says:?}");
    }
    assert_eq!(count.load(Ordering::Relaxed), 1, "only the whole image was encoded");
}

#[tokio::test]
async fn live_requests_wait_for_room() {
    // Room for two images of 16 bytes, in units of 1 KiB: one request of one image takes one unit of two.
    let limits = ImageLimits { live_bytes: 2 * ROOM_UNIT, max_images: 1, ..ImageLimits::default() };
    let (images, ..) = images(limits);
    let first = images.embed(vec![file(PNG)], WHOLE).await.unwrap();
    let _second = images.embed(vec![file(PNG)], WHOLE).await.unwrap();
    let mut third = Box::pin(images.embed(vec![file(PNG)], WHOLE));
    let waits = tokio::select! {
        biased;
        _ = third.as_mut() => false,
        () = std::future::ready(()) => true,
    };
    assert!(waits);
    drop(first);
    assert_eq!(third.await.unwrap().embeddings.len(), 1);
}

/// A server that answers every connection with `answer`, whatever is asked.
async fn server(answer: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked).await;
                let _ = stream.write_all(&answer).await;
                // The end of an answer without a length is the end of the connection; one that says
                // nothing stays open.
                if answer.is_empty() {
                    let _ = stream.read(&mut asked).await;
                }
            });
        }
    });
    port
}

fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {head}\r\n\r\n").as_bytes(), body].concat()
}

fn resolve(addresses: &'static [&'static str]) -> Resolve {
    Arc::new(move |host, port| {
        let found = match host.as_str() {
            "unknown.example" => Err(io::Error::other("no such name")),
            _ => Ok(addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect()),
        };
        Box::pin(async move { found })
    })
}

fn fetching(timeout: Duration) -> ImageLimits {
    ImageLimits {
        fetch: true,
        allow_hosts: vec!["*".into()],
        max_bytes: 1000,
        timeout,
        ..ImageLimits::default()
    }
}

/// Everything public, and the test's own server.
fn public_or_test(ip: IpAddr) -> bool {
    ip == Ipv4Addr::LOCALHOST || is_public(ip)
}

#[tokio::test]
async fn pictures_are_fetched_and_what_servers_do_wrong_is_told() {
    let fetch = async |port: u16| {
        let allow_hosts = vec![format!("pictures.example:{port}")];
        let limits = ImageLimits { allow_hosts, ..fetching(Duration::from_millis(300)) };
        let fetcher = Fetcher::with(&limits, resolve(&["127.0.0.1"]), public_or_test);
        fetcher.fetch(&format!("http://pictures.example:{port}/a.png?size=1")).await
    };
    let fine = server(answer("200 OK\r\ncontent-length: 7", b"picture")).await;
    assert_eq!(fetch(fine).await, Ok(b"picture".to_vec()));
    let redirects =
        |to: &str| server(answer(&format!("302 Found\r\nlocation: {to}\r\ncontent-length: 0"), b""));
    let endless = [b"400\r\n".as_slice(), &[b'x'; 1024], b"\r\n"].concat().repeat(50);
    for (port, says) in [
        (server(answer("404 Not Found\r\ncontent-length: 0", b"")).await, "status 404"),
        (server(answer("200 OK\r\ncontent-length: 1001", b"x")).await, "more than 1000 bytes"),
        (server(answer("200 OK\r\ntransfer-encoding: chunked", &endless)).await, "more than 1000 bytes"),
        (server(answer("200 OK\r\ncontent-length: 50", b"half")).await, "broke off"),
        (server(b"SSH-2.0-OpenSSH\r\n".to_vec()).await, "does not answer"),
        (server(Vec::new()).await, "took longer"),
        (redirects("http://169.254.169.254/latest/meta-data/").await, "not among the hosts"),
        (redirects("file:///etc/passwd").await, "file: URLs are not fetched"),
        (redirects("http://pictures.example/").await, "not a"),
        (redirects("//localhost/").await, "not among the hosts"),
        (redirects("again").await, "more than 3 redirects"),
        (server(answer("302 Found\r\ncontent-length: 0", b"")).await, "redirects to nowhere"),
    ] {
        let error = fetch(port).await.expect_err(says).to_string();
        assert!(error.contains(says) || says == "not a" && error.contains("not among"), "{error}: {says}");
    }
}

#[tokio::test]
async fn no_name_or_address_leads_to_private_places() {
    let limits = fetching(Duration::from_secs(5));
    let fine = server(answer("200 OK\r\ncontent-length: 2", b"no")).await;
    // By address, in every spelling, though the operator allows every host.
    let hosts = vec![
        "*".to_owned(),
        format!("127.0.0.1:{fine}"),
        format!("[::1]:{fine}"),
        format!("localhost:{fine}"),
    ];
    let limits = ImageLimits { allow_hosts: hosts, ..limits };
    let real = Fetcher::new(&limits);
    for url in [
        format!("http://127.0.0.1:{fine}/"),
        format!("http://localhost:{fine}/"),
        format!("http://2130706433:{fine}/"),
        format!("http://0x7f.0.0.1:{fine}/"),
        format!("http://[::1]:{fine}/"),
        "http://169.254.169.254/latest/meta-data/".into(),
        "http://[::ffff:169.254.169.254]/".into(),
        "http://10.0.0.1/".into(),
        "http://0/".into(),
    ] {
        let error = real.fetch(&url).await.expect_err(&url);
        assert!(matches!(&error, FetchError::Refused(what) if what.contains("not public")), "{url}: {error}");
    }
    for url in
        ["file:///etc/passwd", "ftp://images.example/", "unix:/run/x.sock", "https://user@images.example/"]
    {
        assert!(matches!(real.fetch(url).await, Err(FetchError::Refused(_))), "{url}");
    }
    // By name: one private address among public ones is enough.
    for addresses in [
        &["10.0.0.1"] as &[_],
        &["127.0.0.1"],
        &["169.254.169.254"],
        &["::1"],
        &["fd00::1"],
        &["::ffff:192.168.0.1"],
        &["93.184.216.34", "192.168.0.1"],
    ] {
        let fetcher = Fetcher::with(&limits, resolve(addresses), is_public);
        let error = fetcher.fetch("https://inside.example/").await.expect_err("private");
        assert!(matches!(&error, FetchError::Refused(what) if what.contains("not public")), "{error}");
    }
    let fetcher = Fetcher::with(&limits, resolve(&[]), is_public);
    for host in ["unknown.example", "empty.example"] {
        let error = fetcher.fetch(&format!("https://{host}/")).await.expect_err(host);
        assert_eq!(error, FetchError::Failed(format!("{host} has no address")));
    }
    // A redirect is checked as the first URL is: its name leads to another, private, address.
    let port =
        server(answer("302 Found\r\nlocation: http://second.example/\r\ncontent-length: 0", b"")).await;
    let twice: Resolve = Arc::new(|host, port| {
        let ip = if host == "first.example" { "127.0.0.1" } else { "10.0.0.1" };
        Box::pin(async move { Ok(vec![SocketAddr::new(ip.parse().unwrap(), port)]) })
    });
    let allow_hosts = vec![format!("first.example:{port}"), "second.example".into()];
    let fetcher = Fetcher::with(&ImageLimits { allow_hosts, ..limits }, twice, public_or_test);
    let error =
        fetcher.fetch(&format!("http://first.example:{port}/")).await.expect_err("a private redirect");
    assert!(matches!(&error, FetchError::Refused(what) if what.contains("second.example")), "{error}");
    assert!(Fetcher::new(&fetching(Duration::from_secs(1))).has_tls(), "TLS has its roots");
    assert!(Fetcher::new(&fetching(Duration::from_secs(1))).has_tls(), "TLS has its roots");
}
