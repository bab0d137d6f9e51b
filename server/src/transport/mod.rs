//! Connections of both servers: accepted within a limit, with TLS where it is configured.

mod stall;
#[cfg(test)]
mod tests;
mod tls;
mod unread;

pub use tls::{Tls, TlsConfig, TlsError};

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;

use stall::Stall;
pub(crate) use unread::Unread;

/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a client may leave what is sent to it unread, by default.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// After a failed accept: out of file descriptors, which does not change at once.
const ACCEPT_AGAIN: Duration = Duration::from_millis(10);

/// Where a server's connections come from.
#[derive(Debug)]
pub struct Transport {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    tls: Option<Arc<Tls>>,
    write_timeout: Duration,
}

impl Transport {
    /// At most `max_connections` at once from `listener`, with TLS when there is a `tls`.
    pub fn new(listener: TcpListener, max_connections: usize, tls: Option<Arc<Tls>>) -> Self {
        let permits = Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS));
        Self { listener, permits: Arc::new(permits), tls, write_timeout: WRITE_TIMEOUT }
    }

    /// Closes connections whose peer reads nothing of what is sent for so long.
    #[must_use]
    pub fn with_write_timeout(self, write_timeout: Duration) -> Self {
        Self { write_timeout, ..self }
    }

    /// How long a peer may leave what is sent to it unread.
    pub(crate) fn write_timeout(&self) -> Duration {
        self.write_timeout
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection. Above the limit they wait in the operating system's queue. Never fails: an
    /// error is this connection's or passes. The future may be dropped at any time.
    pub(crate) async fn accept(&self) -> Incoming {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // Tokens are small packets that must not wait for the next one.
                    let _ = stream.set_nodelay(true);
                    let stall = Stall::new(self.write_timeout);
                    return Incoming { stream, tls: self.tls.clone(), stall, permit };
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}

/// A connection that was accepted, before its handshake.
pub(crate) struct Incoming {
    stream: TcpStream,
    tls: Option<Arc<Tls>>,
    stall: Stall,
    permit: Option<OwnedSemaphorePermit>,
}

impl Incoming {
    /// Shakes hands. Takes as long as the client likes, up to a limit: not in the accept loop.
    ///
    /// # Errors
    /// The client's: no TLS, no certificate that is trusted, too slow.
    pub(crate) async fn open(self) -> io::Result<Connection> {
        let io = match self.tls {
            None => Io::Plain(self.stream),
            Some(tls) => {
                let shaken = tokio::time::timeout(HANDSHAKE, tls.accept(self.stream)).await;
                Io::Tls(Box::new(shaken.map_err(|_| io::ErrorKind::TimedOut)??))
            }
        };
        Ok(Connection { io, stall: self.stall, _permit: self.permit })
    }
}

/// An open connection; its place among the allowed ones is free again when it is dropped.
pub(crate) struct Connection {
    io: Io,
    stall: Stall,
    _permit: Option<OwnedSemaphorePermit>,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Calls a method of whichever stream it is.
macro_rules! either {
    ($connection:ident, $stream:ident => $call:expr) => {
        match &mut $connection.io {
            Io::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            Io::Tls(stream) => {
                let $stream = Pin::new(stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        either!(this, stream => stream.poll_read(cx, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = either!(this, stream => stream.poll_write(cx, bytes));
        this.stall.check(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = either!(this, stream => stream.poll_write_vectored(cx, slices));
        this.stall.check(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = either!(this, stream => stream.poll_flush(cx));
        this.stall.check(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let closed = either!(this, stream => stream.poll_shutdown(cx));
        this.stall.check(cx, closed)
    }
}

/// No handler asks who is at the other end.
impl tonic::transport::server::Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
