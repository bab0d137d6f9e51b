//! Fetching images by URL: guarded at every hop, bounded in time and bytes.
//!
//! A name is resolved once; every address that it has must be public, and the connection goes to the very
//! address that was checked, so that a second answer of the name server (DNS rebinding) counts for nothing. A
//! redirect is a new URL: it is checked from the start. No proxy, cookie or credential is ever used.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, CONTENT_LENGTH, HOST, LOCATION, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Url;

use super::ImageLimits;
use super::guard::{Target, check, is_public};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;

/// Why an image could not be fetched, as a sentence for the client. It says nothing of what lies behind an
/// address that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Fetching is off.
    #[error(
        "this server does not fetch images; send a data: URL (the operator turns fetching on with images.fetch)"
    )]
    Off,
    /// The URL, its host or its address is not allowed.
    #[error("{0}")]
    Refused(String),
    /// The host could not be reached, or did not answer as it should.
    #[error("{0}")]
    Failed(String),
    /// It is larger than images may be.
    #[error("it has more than {0} bytes (images.max_bytes)")]
    TooLarge(usize),
    /// It took too long.
    #[error("fetching it took longer than {0} s (images.timeout_seconds)")]
    TimedOut(u64),
}

/// What finds the addresses of a host.
pub type Resolve = Arc<
    dyn Fn(String, u16) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> + Send + Sync,
>;

/// Fetches images.
#[derive(Clone)]
pub struct Fetcher {
    on: bool,
    allowed: Vec<String>,
    max_bytes: usize,
    timeout: Duration,
    tls: Option<TlsConnector>,
    resolve: Resolve,
    is_allowed: fn(IpAddr) -> bool,
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetcher")
            .field("on", &self.on)
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
}

impl Fetcher {
    /// A fetcher within `limits`, over the system's resolver.
    pub fn new(limits: &ImageLimits) -> Self {
        let resolve: Resolve = Arc::new(|host, port| {
            Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
        });
        Self::with(limits, resolve, is_public)
    }

    /// A fetcher that asks `resolve` for addresses and connects to those that `is_allowed`.
    pub fn with(limits: &ImageLimits, resolve: Resolve, is_allowed: fn(IpAddr) -> bool) -> Self {
        Self {
            on: limits.fetch,
            allowed: limits.allow_hosts.clone(),
            max_bytes: limits.max_bytes,
            timeout: limits.timeout,
            tls: limits.fetch.then(connector).flatten(),
            resolve,
            is_allowed,
        }
    }

    /// Whether `https:` can be spoken.
    #[cfg(test)]
    pub(super) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The bytes at `url`.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        let url = Url::parse(url).map_err(|e| FetchError::Refused(format!("its URL is malformed: {e}")))?;
        if !self.on {
            return match url.scheme() {
                "http" | "https" => Err(FetchError::Off),
                // Any other scheme would not help to turn it on for.
                _ => check(&url, &[]).and(Err(FetchError::Off)),
            };
        }
        let seconds = self.timeout.as_secs();
        match tokio::time::timeout(self.timeout, self.follow(url)).await {
            Ok(fetched) => fetched,
            Err(_) => Err(FetchError::TimedOut(seconds)),
        }
    }

    async fn follow(&self, mut url: Url) -> Result<Vec<u8>, FetchError> {
        for _ in 0..=MAX_REDIRECTS {
            let target = check(&url, &self.allowed)?;
            let response = self.request(&url, &target).await?;
            if !response.status().is_redirection() {
                return self.body(response, &target.host).await;
            }
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let Some(next) = next else {
                return Err(FetchError::Failed(format!("{} redirects to nowhere", target.host)));
            };
            if target.tls && next.scheme() == "http" {
                return Err(FetchError::Refused("a redirect from https: to http: is not followed".into()));
            }
            url = next;
        }
        Err(FetchError::Failed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// An address of `target` that may be connected to: the only one that is.
    async fn address(&self, target: &Target) -> Result<SocketAddr, FetchError> {
        let host = target.host.clone();
        let addresses = match host.parse::<IpAddr>() {
            Ok(ip) => Ok(vec![SocketAddr::new(ip, target.port)]),
            Err(_) => (self.resolve)(host, target.port).await,
        };
        let addresses = addresses.unwrap_or_default();
        if addresses.iter().any(|address| !(self.is_allowed)(address.ip())) {
            let what = format!("{} has an address that is not public", target.host);
            return Err(FetchError::Refused(what));
        }
        // Where there is a choice, the older protocol is the one that every network has.
        let best = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
        let best = best.map(|address| SocketAddr::new(address.ip(), target.port));
        best.ok_or_else(|| FetchError::Failed(format!("{} has no address", target.host)))
    }

    async fn request(&self, url: &Url, target: &Target) -> Result<Response<Incoming>, FetchError> {
        let address = self.address(target).await?;
        let unreachable = |_| FetchError::Failed(format!("{} cannot be reached", target.host));
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        if !target.tls {
            return send(stream, url, target).await;
        }
        let Some(tls) = &self.tls else {
            return Err(FetchError::Failed("https: is not available on this machine".into()));
        };
        let name = ServerName::try_from(target.host.clone())
            .map_err(|_| FetchError::Refused(format!("{} is no name that can be certified", target.host)))?;
        let stream = tls.connect(name, stream).await;
        let stream =
            stream.map_err(|e| FetchError::Failed(format!("TLS with {} failed: {e}", target.host)))?;
        send(stream, url, target).await
    }

    async fn body(&self, response: Response<Incoming>, host: &str) -> Result<Vec<u8>, FetchError> {
        if response.status() != StatusCode::OK {
            let status = response.status().as_u16();
            return Err(FetchError::Failed(format!("{host} answered with status {status}")));
        }
        let announced =
            response.headers().get(CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
        if announced.is_some_and(|len: usize| len > self.max_bytes) {
            return Err(FetchError::TooLarge(self.max_bytes));
        }
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| FetchError::Failed(format!("{host} broke off")))?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > self.max_bytes {
                return Err(FetchError::TooLarge(self.max_bytes));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    }
}

/// Sends the one request of a connection, which ends with the response.
async fn send<S>(stream: S, url: &Url, target: &Target) -> Result<Response<Incoming>, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed =
        |e: &dyn std::fmt::Display| FetchError::Failed(format!("{} does not answer: {e}", target.host));
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
    // Ends when the response has been read or dropped, or the peer closes.
    let connection = tokio::spawn(connection);
    let path = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let host = url.host_str().unwrap_or_default();
    let authority = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    let request = Request::get(path)
        .header(HOST, authority)
        .header(ACCEPT, "image/png, image/jpeg, image/webp")
        .header(USER_AGENT, concat!("rheostat/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|e| failed(&e))?;
    let response = sender.send_request(request).await.map_err(|e| failed(&e));
    if response.is_err() {
        connection.abort();
    }
    response
}

/// TLS with the roots that browsers trust. `None` when there is no working cryptography, which a test excludes.
fn connector() -> Option<TlsConnector> {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    Some(TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth())))
}
