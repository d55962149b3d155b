//! The init handshake: two sidecars exchange their names, the layout of their chunks and the receiver's
//! slots.
//!
//! ```text
//! sender (REQ)                                   receiver (ROUTER on the init port)
//!    │ NixlInitRequest{metadata, x: Hello}   ───────▶ │ checks version and layout
//!    │ ◀─────── NixlInitResponse{name, metadata, x: Hello or refusal}
//!    │ NixlMemRegRequest{name, rows, x: v}   ───────▶ │
//!    │ ◀─────── NixlMemRegResponse{rows, x: Pages}
//! ```
//!
//! The receiver keeps no state between the two requests, so it answers these requests in any order and any
//! number of times. A peer that sends no `x` is LMCache.

use std::time::Duration;

use protocol::codec;
use protocol::dlist::{self, Memory, Row};
use protocol::local::Target;
use protocol::message::{
    Hello, Init, NixlInitRequest, NixlInitResponse, NixlMemRegRequest, NixlMemRegResponse, Pages,
    Refusal, Version,
};
use protocol::metadata::agent_name;
use protocol::{Reason, VERSION};
use serde_bytes::ByteBuf;

use common::zmq::{Protection, RequestError, Requester};

/// The data that one side of the handshake sends about itself.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// Name, epoch, layout and wires. If `refused` is set, this side refuses every peer, e.g. while draining.
    pub(crate) hello: Hello,
    /// NIXL agent metadata; empty without NIXL.
    pub(crate) metadata: Vec<u8>,
    /// NIXL rows of the buffer, one per slot; empty without NIXL.
    pub(crate) rows: Vec<Row>,
    /// The kind of memory of the buffer.
    pub(crate) memory: Memory,
    /// Number of slots and their size in bytes; 0 slots until the first engine has sent its hello.
    pub(crate) pages: Pages,
}

/// The receiver's reaction to a request on its init port.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// Send this reply.
    Reply(Vec<u8>),
    /// Keep the request, and answer it when an engine has connected. LMCache's sender keeps the slots of the
    /// first reply for the life of its process and waits for the reply without a timeout, so a late reply is
    /// better than a reply without slots.
    NotYet,
    /// The message is not a request of the handshake: end the connection.
    Malformed(String),
}

/// Returns the receiver's reaction to one request. `ours` is the receiver's own data.
pub(crate) fn answer(request: &[u8], ours: &Identity) -> Answer {
    let reply = match codec::decode(request) {
        Ok(Init::NixlInitRequest(request)) => {
            if request.x.is_none() && ours.hello.layout.is_none() {
                return Answer::NotYet;
            }
            Init::NixlInitResponse(introduce(&request, ours))
        }
        Ok(Init::NixlMemRegRequest(request)) => {
            if request.x.is_none() && ours.hello.layout.is_none() {
                return Answer::NotYet;
            }
            Init::NixlMemRegResponse(NixlMemRegResponse {
                remote_xfer_dlist_bytes: ByteBuf::from(dlist::build(&ours.rows, ours.memory)),
                x: request.x.map(|_| ours.pages),
            })
        }
        Ok(Init::NixlInitResponse(_) | Init::NixlMemRegResponse(_)) => {
            return Answer::Malformed("an answer instead of a request".to_owned());
        }
        Err(error) => return Answer::Malformed(error.to_string()),
    };
    Answer::Reply(codec::encode(&reply))
}

fn introduce(request: &NixlInitRequest, ours: &Identity) -> NixlInitResponse {
    let name = agent_name(&request.local_meta_bytes).unwrap_or_default();
    let x = request.x.as_ref().map(|theirs| {
        let mut hello = ours.hello.clone();
        hello.refused = hello.refused.or_else(|| unfit(&ours.hello, theirs));
        hello
    });
    NixlInitResponse {
        remote_agent_name: ByteBuf::from(name),
        remote_meta_bytes: ByteBuf::from(ours.metadata.clone()),
        x,
    }
}

/// Returns the reason why these two sidecars cannot exchange chunks; absent if they can.
fn unfit(ours: &Hello, theirs: &Hello) -> Option<Refusal> {
    let refusal = |reason, text| Some(Refusal { reason, text });
    let (our_name, their_name) = (ours.id.escape_debug(), theirs.id.escape_debug());
    if theirs.v != ours.v {
        return refusal(
            Reason::VersionMismatch,
            format!(
                "protocol version: {their_name} speaks {}, {our_name} speaks {}; run the same release on both",
                theirs.v, ours.v
            ),
        );
    }
    let (ours, theirs) = match (&ours.layout, &theirs.layout) {
        (Some(ours), Some(theirs)) => (ours, theirs),
        (None, _) => {
            return refusal(
                Reason::NoEngine,
                format!("{our_name} has no engine yet, so it has no slots"),
            );
        }
        (_, None) => {
            return refusal(
                Reason::NoEngine,
                format!("{their_name} has no engine yet, so its chunks have no shape"),
            );
        }
    };
    let (field, our_value, their_value) = ours.difference(theirs)?;
    refusal(
        Reason::LayoutMismatch,
        format!(
            "{field}: {their_name} has {}, {our_name} has {}; both sides need the same",
            their_value.escape_debug(),
            our_value.escape_debug()
        ),
    )
}

/// A receiver that a sender may push to.
#[derive(Clone, Debug)]
pub(crate) struct Linked {
    /// The receiver's hello; absent if the receiver is LMCache.
    pub(crate) hello: Option<Hello>,
    /// The receiver's NIXL agent metadata; empty without NIXL.
    pub(crate) metadata: Vec<u8>,
    /// The receiver's NIXL rows, one per slot; empty without NIXL.
    pub(crate) rows: Vec<Row>,
    /// The kind of memory of the receiver's buffer.
    pub(crate) memory: Memory,
    /// Number of the receiver's slots and their size in bytes.
    pub(crate) pages: Pages,
}

/// The reason why a handshake did not produce a link.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// The receiver could not be reached, or it closed the connection.
    #[error(transparent)]
    Unreached(#[from] RequestError),
    /// The receiver did not answer before the deadline.
    #[error("no answer from {peer} within {after:?}")]
    Timeout {
        /// Address of the receiver, `host:init_port`.
        peer: String,
        /// The deadline.
        after: Duration,
    },
    /// The receiver's answer is not valid.
    #[error("{peer} sent no valid answer: {cause}")]
    Malformed {
        /// Address of the receiver, `host:init_port`.
        peer: String,
        /// The fault of the answer.
        cause: String,
    },
    /// The two sidecars do not fit together, or the receiver refuses every peer, e.g. while it has no engine.
    #[error("cannot link with {peer} ({}): {}", .refusal.reason, .refusal.text)]
    Refused {
        /// Address of the receiver, `host:init_port`.
        peer: String,
        /// The reason and its text.
        refusal: Refusal,
    },
}

impl InitError {
    /// Returns the reason of the error, for counters and for the requests that needed this link.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Refused { refusal, .. } => refusal.reason,
            Self::Unreached(_) | Self::Timeout { .. } | Self::Malformed { .. } => Reason::NoLink,
        }
    }
}

/// Runs the sender's side of the handshake, and fails if it takes longer than `deadline`.
///
/// # Errors
/// See [`InitError`].
///
/// # Cancel safety
/// Dropping the future drops the connection; the receiver keeps nothing.
pub(crate) async fn handshake(
    target: &Target,
    ours: &Identity,
    protection: &Protection,
    deadline: Duration,
) -> Result<Linked, InitError> {
    let peer = format!("{}:{}", target.host, target.init_port);
    match tokio::time::timeout(deadline, exchange(target, &peer, ours, protection)).await {
        Ok(result) => result,
        Err(_) => Err(InitError::Timeout {
            peer,
            after: deadline,
        }),
    }
}

async fn exchange(
    target: &Target,
    peer: &str,
    ours: &Identity,
    protection: &Protection,
) -> Result<Linked, InitError> {
    let malformed = |cause: String| InitError::Malformed {
        peer: peer.to_owned(),
        cause,
    };
    let mut socket = Requester::connect(&target.host, target.init_port, protection).await?;

    // The hellos come first: if the layouts differ, the sender must not learn or use any slot.
    let introduced = introduce_to(&mut socket, peer, &ours.metadata, &ours.hello).await?;
    // A refusal by the receiver takes precedence. The sender also checks the receiver's hello itself, so that
    // the two ends of a link never have different layouts.
    if let Some(theirs) = &introduced.x
        && let Some(refusal) = theirs
            .refused
            .clone()
            .or_else(|| unfit(&ours.hello, theirs))
    {
        return Err(InitError::Refused {
            peer: peer.to_owned(),
            refusal,
        });
    }

    if introduced.x.is_none()
        && let Some(layout) = &ours.hello.layout
        && !layout.groups.is_empty()
    {
        return Err(InitError::Refused {
            peer: peer.to_owned(),
            refusal: Refusal {
                reason: Reason::LayoutMismatch,
                text: format!(
                    "groups: the receiver is LMCache, which has no KV with several groups of layers, and this model \
                     has {}: use the pd-sidecar connector on both sides",
                    layout.groups.len()
                ),
            },
        });
    }

    // LMCache's receiver looks up the sender's rows in the sender's metadata, and its process ends if the
    // sender sends no row. A sidecar's receiver needs no row, so this sender sends no row to a sidecar: the
    // receiver need not know addresses of the sender's memory.
    let shown = match introduced.x {
        Some(_) => &[],
        None => ours.rows.get(..1).unwrap_or_default(),
    };
    let request = Init::NixlMemRegRequest(NixlMemRegRequest {
        remote_agent_name: introduced.remote_agent_name,
        local_id: ours.hello.id.clone(),
        local_xfer_dlist_bytes: ByteBuf::from(dlist::build(shown, ours.memory)),
        x: Some(Version { v: VERSION }),
    });
    let registered = match codec::decode(&socket.request(codec::encode(&request)).await?) {
        Ok(Init::NixlMemRegResponse(response)) => response,
        Ok(_) => return Err(malformed("not a NixlMemRegResponse".to_owned())),
        Err(error) => return Err(malformed(error.to_string())),
    };
    // The description of the slots comes from the peer, so it is checked: with a wrong slot size, one write
    // could hit two slots.
    let (memory, rows) = dlist::parse(&registered.remote_xfer_dlist_bytes)
        .map_err(|error| malformed(error.to_string()))?;
    let pages = pages(&rows, registered.x).map_err(malformed)?;
    check_size(&pages, ours).map_err(|refusal| InitError::Refused {
        peer: peer.to_owned(),
        refusal,
    })?;
    Ok(Linked {
        hello: introduced.x,
        metadata: introduced.remote_meta_bytes.into_vec(),
        rows,
        memory,
        pages,
    })
}

/// Sends this side's hello, and returns the receiver's answer.
async fn introduce_to(
    socket: &mut Requester,
    peer: &str,
    metadata: &[u8],
    hello: &Hello,
) -> Result<NixlInitResponse, InitError> {
    let malformed = |cause: String| InitError::Malformed {
        peer: peer.to_owned(),
        cause,
    };
    let request = Init::NixlInitRequest(NixlInitRequest {
        local_meta_bytes: ByteBuf::from(metadata.to_vec()),
        x: Some(hello.clone()),
    });
    match codec::decode(&socket.request(codec::encode(&request)).await?) {
        Ok(Init::NixlInitResponse(response)) => Ok(response),
        Ok(_) => Err(malformed("not a NixlInitResponse".to_owned())),
        Err(error) => Err(malformed(error.to_string())),
    }
}

/// Asks a receiver for its hello, and makes no link. Do not ask LMCache: its receiver takes every request for a sender.
///
/// # Errors
/// See [`InitError`]. A hello that refuses this side is no error.
///
/// # Cancel safety
/// Dropping the future drops the connection; the receiver keeps nothing.
pub(crate) async fn ask_hello(
    target: &Target,
    ours: &Hello,
    protection: &Protection,
    deadline: Duration,
) -> Result<Option<Hello>, InitError> {
    let peer = format!("{}:{}", target.host, target.init_port);
    let asked = async {
        let mut socket = Requester::connect(&target.host, target.init_port, protection).await?;
        Ok(introduce_to(&mut socket, &peer, &[], ours).await?.x)
    };
    match tokio::time::timeout(deadline, asked).await {
        Ok(result) => result,
        Err(_) => Err(InitError::Timeout {
            peer,
            after: deadline,
        }),
    }
}

/// Returns the peer's slots, which its rows and the field `x` of its message describe.
///
/// Returns an error if the rows contradict `x`, or if both are missing.
fn pages(rows: &[Row], said: Option<Pages>) -> Result<Pages, String> {
    let shown = rows.first().map(|first| Pages {
        v: 0,
        slots: u32::try_from(rows.len()).unwrap_or(u32::MAX),
        slot_bytes: first.bytes,
    });
    if let Some(shown) = shown
        && rows.iter().any(|row| row.bytes != shown.slot_bytes)
    {
        return Err("its slots are not all of one size".to_owned());
    }
    match (said, shown) {
        (Some(said), Some(shown))
            if (said.slots, said.slot_bytes) != (shown.slots, shown.slot_bytes) =>
        {
            Err(format!(
                "its hello names {} slots of {} bytes, but its list has {} of {}",
                said.slots, said.slot_bytes, shown.slots, shown.slot_bytes
            ))
        }
        (Some(said), _) => Ok(said),
        (None, Some(shown)) => Ok(shown),
        (None, None) => Err("it names no slots".to_owned()),
    }
}

fn check_size(pages: &Pages, ours: &Identity) -> Result<(), Refusal> {
    let chunk = ours.hello.layout.as_ref().and_then(|l| l.chunk_bytes());
    match chunk {
        Some(bytes) if bytes == pages.slot_bytes && pages.slots > 0 => Ok(()),
        _ => Err(Refusal {
            reason: Reason::LayoutMismatch,
            text: format!(
                "it has {} slots of {} bytes, a chunk here has {}; check model, dtype, chunk_size and tensor-parallel size",
                pages.slots,
                pages.slot_bytes,
                chunk.unwrap_or_default()
            ),
        }),
    }
}

#[cfg(test)]
mod tests;
