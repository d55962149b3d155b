//! Handles the senders' messages on a receiver's ports and passes them to the machine.

use common::zmq::{Closed, FromPeer, RouterServer};
use protocol::codec;
use protocol::message::{CacheQueryResponse, Init, Query, ToReceiver, Written};
use protocol::receiver::{Event, Principal, Route};
use tracing::{debug, info, warn};

use super::ReceiverTask;
use super::checks::Checked;
use crate::peer::handshake::{self, Answer};
use crate::transport::ucx::CONSENT;

impl ReceiverTask {
    pub(super) fn on_init(&mut self, route: Route, bytes: &[u8]) {
        let request = codec::decode(bytes).ok();
        let claimed = match &request {
            Some(Init::NixlInitRequest(request)) => request.x.as_ref().map(|x| x.id.as_str()),
            Some(Init::NixlMemRegRequest(request)) => Some(request.local_id.as_str()),
            _ => None,
        };
        if let Some(member) = self.init.member(route)
            && !claimed.is_some_and(|id| member.has_rank(id))
        {
            self.impostor("init", &member.name, claimed.unwrap_or_default());
            self.init.disconnect(route);
            return;
        }
        if let Some(Init::NixlInitRequest(request)) = &request
            && let Some(hello) = &request.x
        {
            let from = self.init.address(route).unwrap_or_default();
            self.fences.introduce(hello, from);
            self.expect();
        }
        match handshake::answer(bytes, &self.identity) {
            Answer::Reply(reply) => {
                if let Some(Init::NixlMemRegRequest(request)) = request
                    && request.x.is_none()
                {
                    let from = self.init.address(route).unwrap_or_default();
                    let (port, name) = (self.init.port(), &request.local_id);
                    if self.lmcache_peers.show(route, from, port, name) {
                        info!(
                            peer = from,
                            name = name.escape_debug().to_string(),
                            "an LMCache sender has received the slots' addresses"
                        );
                        if self.context.config.ucx.tcp_host.is_none() {
                            warn!(
                                peer = from,
                                "LMCache's agents connect over UCX's TCP, which this sidecar does not open: {CONSENT}"
                            );
                        }
                    }
                }
                if let Err(error) = self.init.send(route, reply) {
                    debug!(%error, "init answer not sent");
                }
            }
            Answer::NotYet if self.pending.has_room_for(bytes) => {
                self.pending.introduced(route, bytes)
            }
            Answer::NotYet => self.init.disconnect(route),
            Answer::Malformed(error) => {
                warn!(
                    peer = self.init.name(route),
                    error, "malformed message on the init port"
                );
                self.context.malformed("init");
                self.init.disconnect(route);
            }
        }
    }

    pub(super) fn on_alloc_port(&mut self, event: FromPeer) {
        match event {
            FromPeer::Message(route, bytes) => match codec::decode::<ToReceiver>(&bytes) {
                Ok(message) => {
                    debug!(?route, ?message, "from sender");
                    self.on_message(route, message);
                }
                Err(error) => {
                    warn!(peer = self.alloc.name(route), %error, "malformed message on the alloc port");
                    self.context.malformed("alloc");
                    self.alloc.disconnect(route);
                }
            },
            FromPeer::Lost(route) => {
                self.lmcache_peers.lost(route);
                self.pending.lost_alloc(route);
                // The machine must receive the connection's last messages before it learns that the
                // connection has ended.
                if !self.checks.lost(route) {
                    self.feed(Event::PeerLost { route });
                }
            }
        }
    }

    /// Logs and counts a message under a name that the connection's key does not prove.
    fn impostor(&self, port: &'static str, principal: &str, claimed: &str) {
        let claimed = claimed.escape_debug().to_string();
        warn!(
            principal,
            claimed, port, "a peer used another name than the one in the roster: connection ended"
        );
        self.context.malformed(port);
    }

    pub(super) fn on_message(&mut self, route: Route, message: ToReceiver) {
        let member = self.alloc.member(route).cloned();
        if let Some(member) = &member {
            // LMCache's messages name no sender. LMCache has no keys, so a peer with a key has no reason to send them.
            let claimed = match &message {
                ToReceiver::AllocRequest(request) => {
                    Some(request.x.as_ref().map_or("", |x| x.id.as_str()))
                }
                ToReceiver::CancelNotif(cancel) if cancel.x.is_none() => Some(""),
                _ => None,
            };
            if let Some(claimed) = claimed.filter(|id| !member.has_rank(id)) {
                self.impostor("alloc", &member.name, claimed);
                self.alloc.disconnect(route);
                return;
            }
        }
        let lmcache = match &message {
            ToReceiver::AllocRequest(request) => request.x.is_none(),
            ToReceiver::CancelNotif(cancel) => cancel.x.is_none(),
            _ => false,
        };
        if self.machine.is_none() && lmcache && self.pending.has_room() {
            self.pending.asked(route, message);
            return;
        }
        if self.machine.is_none() {
            // Without an engine there are no slots to grant. The sender connects again later, and then the
            // machine answers.
            self.alloc.disconnect(route);
            return;
        }
        let known = self.machine.as_ref().is_some_and(|m| m.is_connected(route));
        if !known {
            let address = self.alloc.address(route).unwrap_or_default();
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
            let host = host.to_owned();
            let principal = member.map(|member| Principal(member.name.to_string()));
            self.feed(Event::Connected {
                route,
                host,
                principal,
            });
        }
        if lmcache {
            self.introduce(route);
        }
        match message {
            ToReceiver::Written(written) => self.on_written(route, written),
            message => self.feed(Event::Peer { route, message }),
        }
    }

    /// Compares the sender's checksums before the machine receives the message, if checksums are on.
    fn on_written(&mut self, route: Route, mut written: Written) {
        if let (true, Some(machine), Some(slot_layout)) = (
            self.context.config.checksum,
            &self.machine,
            self.engines.slot_layout(),
        ) {
            let chunks = machine.unchecked(route, &written);
            let buffer = &self.buffer;
            let rest = self
                .checks
                .take(route, written, chunks, buffer, slot_layout.slot_bytes);
            let Some(rest) = rest else {
                return;
            };
            written = rest;
        }
        let message = ToReceiver::Written(written);
        self.feed(Event::Peer { route, message });
    }

    pub(super) fn on_checked(&mut self, checked: Checked) {
        let (route, written) = (checked.route, checked.written);
        if checked.sound {
            let message = ToReceiver::Written(written);
            self.feed(Event::Peer { route, message });
        } else {
            self.feed(Event::Corrupt(written.lease));
        }
        if checked.lost {
            self.feed(Event::PeerLost { route });
        }
    }

    /// Tells the machine which sender the connection belongs to, before the first message.
    fn introduce(&mut self, route: Route) {
        let from = self.alloc.address(route).unwrap_or_default().to_owned();
        let identity = self.alloc.name(route).unwrap_or_default();
        let port = self.alloc.port();
        let Some(lmcache_peer) = self.lmcache_peers.meet(route, &from, port, &identity) else {
            return;
        };
        if !lmcache_peer.linked {
            warn!(
                peer = lmcache_peer.sender.id,
                "an LMCache sender made its handshake with an earlier receiver: it gets no slots until it restarts"
            );
        }
        if let Some(process) = lmcache_peer.process {
            self.fences
                .watch(lmcache_peer.sender.clone(), process, &from);
        }
        self.feed(Event::Introduced {
            route,
            sender: lmcache_peer.sender,
            linked: lmcache_peer.linked,
        });
    }

    /// Answers the query of LMCache's bidirectional mode for KV that can be read back. The answer is always
    /// "none", because slots keep no KV after the hand-over.
    pub(super) fn on_query(&mut self, route: Route, bytes: &[u8]) {
        let Some(query) = &mut self.query else {
            return;
        };
        if let Ok(Query::CacheQueryRequest(_)) = codec::decode(bytes) {
            let nothing = Query::CacheQueryResponse(CacheQueryResponse {
                cached_keys: Vec::new(),
                cached_indexes: Vec::new(),
            });
            if let Err(error) = query.send(route, codec::encode(&nothing)) {
                debug!(%error, "query not answered");
            }
        } else {
            self.context.malformed("query");
            query.disconnect(route);
        }
    }
}

/// Returns the next message of the query port; never completes if there is no query port.
pub(super) async fn next_query(query: &mut Option<RouterServer>) -> Result<FromPeer, Closed> {
    match query {
        Some(query) => query.recv().await,
        None => std::future::pending().await,
    }
}
