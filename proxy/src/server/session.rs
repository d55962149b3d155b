//! A WebSocket that is open: its bytes pass between the client and one decode instance until one of them ends it.
//!
//! The proxy does not read the messages. The task of the client's connection passes the bytes, so a session has the
//! place of its connection and the place of its request until it ends.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::select;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::openai::error::{ApiError, Code};
use crate::request::context::RequestContext;
use crate::request::state::Event;
use crate::upstream::upgrade::EngineStream;

/// The session that continues on a connection after the answer to its request; empty for most connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct NextSession(Arc<Mutex<Option<Session>>>);

/// A WebSocket to which both sides have agreed.
#[derive(Debug)]
pub(crate) struct Session {
    /// The client's side, which is there when the answer is written.
    pub client: OnUpgrade,
    /// The engine's side.
    pub engine: EngineStream,
    /// The request that has opened the session.
    pub context: RequestContext,
    /// Longest time without data in either direction.
    pub silence: Duration,
    /// Cancelled when the proxy breaks off what is in flight.
    pub force_shutdown: CancellationToken,
}

impl NextSession {
    /// Leaves a session for the task of the connection.
    pub(crate) fn put(&self, session: Session) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    /// Returns the session that continues on the connection; `None` if there is none.
    pub(crate) fn take(&self) -> Option<Session> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Session {
    /// Passes bytes in both directions until one side ends the session.
    ///
    /// # Cancel safety
    /// Dropping the future closes both connections.
    pub(crate) async fn run(self) {
        let Self {
            client,
            engine,
            mut context,
            silence,
            force_shutdown,
        } = self;
        // The connection broke before the client got the answer: the drop of the context says that the client has left.
        let Ok(client) = client.await else { return };
        let (from_client, to_client) = split(TokioIo::new(client));
        let (from_engine, to_engine) = split(engine);
        let heard = Notify::new();
        let answer = pass(from_engine, to_client, &heard);
        let question = pass(from_client, to_engine, &heard);
        let broken = select! {
            biased;
            () = force_shutdown.cancelled() => ApiError::new(Code::ShuttingDown, "the proxy is shutting down"),
            end = answer => match end {
                Ok(()) => return context.answered(false),
                Err(Broken::Write) => return,
                Err(Broken::Read(e)) => {
                    ApiError::new(Code::DecodeDied, format!("the decode instance broke off the session: {e}"))
                }
            },
            end = question => match end {
                Ok(()) => return context.answered(false),
                Err(Broken::Read(_)) => return,
                Err(Broken::Write) => {
                    ApiError::new(Code::DecodeDied, "the decode instance has closed the session")
                }
            },
            () = silent(&heard, silence) => {
                let limit = humantime::format_duration(silence);
                ApiError::new(Code::DecodeSilent, format!("the session was silent for {limit} (--idle-timeout)"))
            }
        };
        context.broke(&broken);
        context.on(Event::AnswerBroke);
    }
}

/// The end of a direction that did not end properly.
enum Broken {
    /// The sender's connection broke.
    Read(io::Error),
    /// The receiver's connection broke, or the receiver does not read.
    Write,
}

/// Passes bytes in one direction until the sender ends it.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    heard: &Notify,
) -> Result<(), Broken> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await.map_err(Broken::Read)?;
        if count == 0 {
            // The receiver gets the last bytes; whether it still listens does not matter.
            drop(to.shutdown().await);
            return Ok(());
        }
        heard.notify_one();
        to.write_all(&buffer[..count])
            .await
            .map_err(|_| Broken::Write)?;
    }
}

/// Returns when nothing was heard for `limit`.
async fn silent(heard: &Notify, limit: Duration) {
    while timeout(limit, heard.notified()).await.is_ok() {}
}

/// Bytes that are passed on at once. A message of 100 ms of audio has about 4 KiB.
const BUFFER_BYTES: usize = 16 * 1024;
