//! TLS by rustls: certificates from PEM files, read again when the configuration is reloaded.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Where certificates lie, as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The server's certificate, and those between it and its root.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Roots of the clients' certificates. When it is set, who has no such certificate is not served.
    pub client_ca: Option<PathBuf>,
}

/// Certificates that cannot be used, as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read as what it should hold.
    #[error("tls.{what} {path}: {reason}")]
    File {
        /// The configuration's key.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The files do not fit together.
    #[error("tls: {0}")]
    Config(String),
}

/// The TLS side of the servers. New connections get what was read last.
#[derive(Debug)]
pub struct Tls {
    config: TlsConfig,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the certificates.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let current = RwLock::new(server_config(&config)?);
        Ok(Self { config, current })
    }

    /// Reads the same files again, for [`Tls::set`].
    ///
    /// # Errors
    /// [`TlsError`]; what was read before stays in use.
    pub fn read(&self) -> Result<Arc<ServerConfig>, TlsError> {
        server_config(&self.config)
    }

    /// Shows what was read to new connections; open ones go on with what they have.
    pub fn set(&self, fresh: Arc<ServerConfig>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
    }

    /// Shakes hands with a client.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let current = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
        TlsAcceptor::from(current).accept(stream).await
    }
}

fn server_config(config: &TlsConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let certificates = certificates("cert", &config.cert)?;
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|e| file("key", &config.key, &e))?;
    let failed = |e: rustls::Error| TlsError::Config(e.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().map_err(failed)?;
    let builder = match &config.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in self::certificates("client_ca", path)? {
                roots.add(root).map_err(failed)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| TlsError::Config(e.to_string()))?)
        }
    };
    let mut built = builder.with_single_cert(certificates, key).map_err(failed)?;
    built.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(built))
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|e| file(what, path, &e))?;
    if found.is_empty() {
        return Err(file(what, path, &"there is no certificate in it"));
    }
    Ok(found)
}

fn file(what: &'static str, path: &Path, reason: &dyn ToString) -> TlsError {
    TlsError::File { what, path: path.to_owned(), reason: reason.to_string() }
}
