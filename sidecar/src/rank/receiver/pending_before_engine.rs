//! What LMCache's peers said before there was an engine. They wait for the answer without end, also if they are
//! disconnected, so it is kept until one comes.

use protocol::message::ToReceiver;
use protocol::receiver::Route;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct PendingBeforeEngine {
    /// Of the init port.
    introductions: Vec<(Route, Vec<u8>)>,
    /// Of the alloc port, of senders that have known us before.
    asks: Vec<(Route, ToReceiver)>,
}

/// Requests of each kind; a peer beyond it is disconnected, and asks again.
const MAX_PENDING: usize = 64;
/// Of those on the init port: LMCache's have some kilobytes of metadata, and may have 4 MiB.
const MAX_BYTES: usize = 8 << 20;

impl PendingBeforeEngine {
    /// Whether one more request of the init port may wait.
    pub(super) fn has_room_for(&self, request: &[u8]) -> bool {
        let held: usize = self.introductions.iter().map(|(_, b)| b.len()).sum();
        self.introductions.len() < MAX_PENDING && held + request.len() <= MAX_BYTES
    }

    /// Keeps a request of the init port.
    pub(super) fn introduced(&mut self, route: Route, request: &[u8]) {
        self.introductions.push((route, request.to_vec()));
    }

    /// Whether one more question may wait.
    pub(super) fn has_room(&self) -> bool {
        self.asks.len() < MAX_PENDING
    }

    /// Keeps a question.
    pub(super) fn asked(&mut self, route: Route, message: ToReceiver) {
        self.asks.push((route, message));
    }

    /// A connection of the init port has ended.
    pub(super) fn lost_init(&mut self, route: Route) {
        self.introductions.retain(|(pending, _)| *pending != route);
    }

    /// A connection of the alloc port has ended.
    pub(super) fn lost_alloc(&mut self, route: Route) {
        self.asks.retain(|(pending, _)| *pending != route);
    }

    /// The requests of the init port, in order.
    pub(super) fn introductions(&mut self) -> Vec<(Route, Vec<u8>)> {
        std::mem::take(&mut self.introductions)
    }

    /// The questions, in order.
    pub(super) fn asks(&mut self) -> Vec<(Route, ToReceiver)> {
        std::mem::take(&mut self.asks)
    }
}
