use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use super::*;

/// An authority, and what it has signed.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed"))
    }

    /// Writes `NAME.pem` and `NAME.key`.
    fn sign(&self, dir: &Path, name: &str) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let signed = params.signed_by(&key, &self.0).expect("signed");
        std::fs::write(dir.join(format!("{name}.pem")), signed.pem()).expect("written");
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).expect("written");
    }
}

fn client(authority: &Authority, identity: Option<(&Path, &str)>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(authority.0.der().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((dir, name)) => {
            let chain = CertificateDer::pem_file_iter(dir.join(format!("{name}.pem"))).expect("a file");
            let chain = chain.map(|c| c.expect("a certificate")).collect();
            let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}.key"))).expect("a key");
            builder.with_client_auth_cert(chain, key).expect("they fit together")
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// A server that says hello on every connection, and its address.
fn serve(tls: &Arc<Tls>, listener: TcpListener) -> SocketAddr {
    let address = listener.local_addr().expect("bound");
    let transport = Transport::new(listener, 8, Some(Arc::clone(tls)));
    tokio::spawn(async move {
        loop {
            let incoming = transport.accept().await;
            tokio::spawn(async move {
                if let Ok(mut connection) = incoming.open().await {
                    let _ = connection.write_all(b"hello").await;
                    let _ = connection.shutdown().await;
                }
            });
        }
    });
    address
}

/// What the server says, and the certificate that it shows.
async fn hello(address: SocketAddr, client: &TlsConnector) -> io::Result<(String, CertificateDer<'static>)> {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = client.connect(name, TcpStream::connect(address).await?).await?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await?;
    let session = stream.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(b"h2".as_slice()));
    let shown = session.peer_certificates().and_then(<[_]>::first).expect("a certificate").clone();
    Ok((said, shown.into_owned()))
}

#[tokio::test]
async fn certificates_are_shown_checked_and_replaced_while_the_server_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path();
    let (authority, stranger) = (Authority::new(), Authority::new());
    authority.sign(dir, "server");
    authority.sign(dir, "friend");
    stranger.sign(dir, "foe");
    std::fs::write(dir.join("ca.pem"), authority.0.pem()).expect("written");
    let config = TlsConfig {
        cert: dir.join("server.pem"),
        key: dir.join("server.key"),
        client_ca: Some(dir.join("ca.pem")),
    };
    let tls = Arc::new(Tls::load(config).expect("the files fit together"));
    let address = serve(&tls, TcpListener::bind("127.0.0.1:0").await.expect("a port"));

    // Somebody who never shakes hands holds up nobody.
    let _silent = TcpStream::connect(address).await.expect("connected");
    let friend = client(&authority, Some((dir, "friend")));
    let (said, first) = hello(address, &friend).await.expect("trusted on both sides");
    assert_eq!(said, "hello");
    assert!(hello(address, &client(&authority, None)).await.is_err(), "clients need a certificate");
    assert!(hello(address, &client(&authority, Some((dir, "foe")))).await.is_err(), "of a known root");
    assert!(hello(address, &client(&stranger, Some((dir, "friend")))).await.is_err(), "and so do servers");

    // A bad file changes nothing; a good one is shown from then on.
    let good = std::fs::read(dir.join("server.key")).expect("read");
    std::fs::write(dir.join("server.key"), "no key").expect("written");
    let error = tls.read().expect_err("no key").to_string();
    assert!(error.contains("tls.key") && error.contains("server.key"), "{error}");
    std::fs::write(dir.join("server.key"), good).expect("written");
    assert_eq!(hello(address, &friend).await.expect("as before").1, first);
    authority.sign(dir, "server");
    tls.set(tls.read().expect("the files fit together"));
    assert_ne!(hello(address, &friend).await.expect("trusted").1, first);
    // The key of another certificate.
    authority.sign(dir, "other");
    std::fs::copy(dir.join("other.key"), dir.join("server.key")).expect("copied");
    let error = tls.read().expect_err("they do not fit together").to_string();
    assert!(error.starts_with("tls: "), "{error}");
}

#[tokio::test]
async fn connections_above_the_limit_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let transport = Transport::new(listener, 1, None);
    let _clients = [TcpStream::connect(address).await, TcpStream::connect(address).await];
    let first = transport.accept().await.open().await.expect("no handshake");
    let mut second = std::pin::pin!(transport.accept());
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    drop(first);
    second.await.open().await.expect("there is room now");
}

/// The client's side of the connection is never read.
#[tokio::test]
async fn a_client_that_never_reads_is_let_go_and_one_that_is_slow_is_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let patience = Duration::from_millis(300);
    let transport = Transport::new(listener, 2, None).with_write_timeout(patience);
    let _deaf = TcpStream::connect(address).await.expect("connected");
    let mut connection = transport.accept().await.open().await.expect("no handshake");
    // More than any socket's buffers hold.
    let much = vec![0u8; 64 << 20];
    let begin = std::time::Instant::now();
    let error = connection.write_all(&much).await.expect_err("nobody reads");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(begin.elapsed() >= patience);

    let mut slow = TcpStream::connect(address).await.expect("connected");
    let mut connection = transport.accept().await.open().await.expect("no handshake");
    let reader = tokio::spawn(async move {
        let mut part = vec![0; 4 << 20];
        let mut pauses = tokio::time::interval(Duration::from_millis(60));
        for _ in 0..16 {
            pauses.tick().await;
            slow.read_exact(&mut part).await.expect("the connection stays");
        }
    });
    connection.write_all(&much).await.expect("it is read in the end");
    reader.await.expect("no panic");
}
