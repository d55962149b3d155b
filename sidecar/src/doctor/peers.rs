//! The receivers that the command line names: can this host reach them, and over which wire.

use common::identity::Role;
use common::zmq::Protection;
use protocol::local::Target;
use protocol::message::{Advert, Hello};
use protocol::{Epoch, VERSION};
use serde_bytes::ByteBuf;

use super::finding::{Kind, Results, kinds};
use super::reach::{self, Reach};
use super::subject::Subject;
use crate::config::{HostPort, read};
use crate::net::host_id;
use crate::peer::handshake;
use crate::transport::choose::{self, Sides};
use crate::transport::table::{self, Choice};

kinds! {
    REFUSED = Error "peer-refused":
        "a sender that cannot reach the receiver's port moves nothing (reason no_link)";
        "start the receiver, and let pd_peer_host or sidecar.advertise_host name an address that other hosts reach";
    SILENT = Error "peer-silent":
        "packets to this port get lost, so each request to this receiver waits in vain and then moves nothing";
        "open the init, alloc and data ports in the firewall or network policy between the two hosts (set \
         sidecar.tcp_port to a fixed port)";
    UNKNOWN = Error "peer-unknown":
        "a sender that cannot resolve or route to the receiver's host moves nothing (reason no_link)";
        "correct the name, or write an address; check DNS and routes on this host";
    NO_ANSWER = Error "peer-no-answer":
        "the sender's handshake with this receiver fails, so nothing is moved";
        "check that the port is a sidecar's init port (7300 by default), and that both sides have keys, or none";
    PROTOCOL = Error "peer-protocol":
        "two sidecars with different protocol versions refuse each other (reason version_mismatch)";
        "run the same release on both sides";
    NO_WIRE = Error "no-common-wire":
        "without a common transport no KV can be moved (reason no_link)";
        "set sidecar.transport to auto on both sides, or install NIXL on the side that lacks it";
}

/// Asks each receiver for its hello.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    for peer in subject.peers {
        if is_open(peer, "init port", results) {
            greet(subject, peer, results);
        }
    }
}

/// Returns true if the port accepts connections. Reports a port that does not.
fn is_open(at: &HostPort, what: &str, results: &mut Results) -> bool {
    let mut add = |kind: &'static Kind, seen: String| results.add(kind, seen);
    match reach::connect(at) {
        Reach::Open(_) => return true,
        Reach::Refused => add(&REFUSED, format!("no process listens at the {what} {at}")),
        Reach::Silent => add(
            &SILENT,
            format!("the {what} {at} does not answer within {:?}", reach::BOUND),
        ),
        Reach::Nowhere(cause) => add(&UNKNOWN, cause),
    }
    false
}

fn greet(subject: &Subject<'_>, peer: &HostPort, results: &mut Results) {
    let identity = subject.config.and_then(|config| config.identity.as_ref());
    let protection = Protection::of(identity, &[Role::Receiver]);
    let target = Target {
        host: peer.host.clone(),
        init_port: peer.port,
        alloc_port: 0,
    };
    let ours = hello(subject);
    let asked = handshake::ask_hello(&target, &ours, &protection, reach::BOUND);
    let theirs = match reach::block(asked) {
        Ok(Ok(Some(hello))) => hello,
        Ok(Ok(None)) => {
            results.fact("peers", format!("{peer} is LMCache"));
            return;
        }
        Ok(Err(error)) => return results.add(&NO_ANSWER, error.to_string()),
        Err(error) => return results.add(&NO_ANSWER, error),
    };
    if theirs.v != VERSION {
        let seen = format!(
            "{} at {peer} speaks version {}, this program speaks {VERSION}",
            theirs.id.escape_debug(),
            theirs.v
        );
        results.add(&PROTOCOL, seen);
    }
    let hint = theirs
        .refused
        .as_ref()
        .map(|refusal| format!("; it says: {}", refusal.text.escape_debug()));
    match wire(subject, &theirs, &peer.host) {
        Ok(text) => results.fact(
            "peers",
            format!(
                "{} at {peer}: {text}{}",
                theirs.id.escape_debug(),
                hint.unwrap_or_default()
            ),
        ),
        Err(text) => results.add(&NO_WIRE, format!("{peer}: {text}")),
    }
    // A firewall may open the init port and forget the data port, which the receiver chooses by default.
    for advert in &theirs.transports {
        if let Some(at) = data_port(advert, &peer.host) {
            is_open(&at, "data port", results);
        }
    }
}

/// Returns the hello of a sender without an engine.
fn hello(subject: &Subject<'_>) -> Hello {
    Hello {
        v: VERSION,
        id: subject
            .config
            .map_or_else(|| "doctor".to_owned(), |config| config.id.clone()),
        epoch: Epoch(rand::random()),
        layout: None,
        transports: Vec::new(),
        host: host_id::identity(),
        pid: std::process::id(),
        seal: ByteBuf::new(),
        ended: Vec::new(),
        refused: None,
    }
}

/// Returns the wire that a sender on this host would choose, and the reason.
fn wire(subject: &Subject<'_>, theirs: &Hello, host: &str) -> Result<String, String> {
    let wanted = subject
        .config
        .map_or(Choice::Auto, |config| config.transport);
    let on_gpu = subject.wants_gpu();
    let ours: Vec<_> = wanted
        .kinds()
        .filter(|kind| on_gpu || !kind.needs_gpu())
        .filter(|kind| kind.library().is_none_or(|loaded| loaded.is_ok()))
        .collect();
    let same_host = theirs.host == host_id::identity();
    let sides = Sides {
        ours: &ours,
        theirs: Some(&theirs.transports),
        host,
        reaches: &|kind, _| match kind.needs_gpu() && !same_host {
            true => Err("the receiver is on another host".to_owned()),
            false => Ok(()),
        },
        poor: &|_| None,
    };
    let chosen = choose::choose(wanted, sides).map_err(|error| error.to_string())?;
    Ok(format!(
        "a sender here would take {} ({})",
        chosen.kind, chosen.why
    ))
}

/// Returns the host and port at which a transport of the receiver listens.
fn data_port(advert: &Advert, host: &str) -> Option<HostPort> {
    let kind = table::all().find(|kind| kind.as_str() == advert.kind)?;
    read(&kind.address(advert, host)?).ok()
}
