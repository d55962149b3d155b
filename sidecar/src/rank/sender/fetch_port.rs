//! Passes the messages that decode sides send to the fetch port to the machine, and sends the machine's
//! answers.

use common::zmq::{Closed, FromPeer, RouterServer};
use protocol::codec;
use protocol::keep::{ToFetcher, ToKeeper};
use protocol::local::Keeper;
use protocol::receiver::Route;
use protocol::sender::{Event, FetcherId};
use tracing::{debug, warn};

use super::SenderTask;
use crate::rank::context::KeptStatus;

/// The fetch port of one rank.
#[derive(Debug)]
pub(crate) struct FetchPort {
    pub(crate) server: RouterServer,
    /// The address that engines announce to decode sides.
    pub(crate) announced: Keeper,
}

impl SenderTask {
    pub(super) fn on_fetch_port(&mut self, event: FromPeer) {
        // The end of a connection changes nothing in the machine, because kept KV has its own deadline.
        let FromPeer::Message(route, bytes) = event else {
            return;
        };
        match codec::decode::<ToKeeper>(&bytes) {
            Ok(message) => {
                debug!(?route, ?message, "from a decode side");
                let from = FetcherId(route.0);
                self.feed(Event::Fetcher { from, message });
            }
            Err(error) => {
                self.context.malformed("fetch");
                if let Some(port) = &mut self.fetch {
                    warn!(peer = port.server.name(route), %error, "malformed message on the fetch port");
                    port.server.disconnect(route);
                }
            }
        }
    }

    pub(super) fn answer_fetcher(&mut self, to: FetcherId, message: &ToFetcher) {
        let ToFetcher::Gone(gone) = message;
        self.context
            .metrics
            .fetch_refused(self.context.rank, gone.reason);
        let Some(port) = &mut self.fetch else {
            return;
        };
        let route = Route(to.0);
        debug!(peer = port.server.name(route), req = %gone.req, reason = %gone.reason, "no KV for a decode side");
        if let Err(error) = port.server.send(route, codec::encode(message)) {
            debug!(%error, "answer on the fetch port not sent");
        }
    }

    /// Passes the kept requests to the observer if they have changed.
    pub(super) fn publish_kept(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        let changes = machine.kept_changes();
        if std::mem::replace(&mut self.kept_changes, changes) == changes {
            return;
        }
        let mut requests = machine.kept().map(|kept| KeptStatus {
            req: kept.req.clone(),
            tokens: kept.tokens,
            since: self.clock.instant(kept.since),
        });
        self.context.observer.kept(self.context.rank, &mut requests);
    }
}

/// Returns the next message of the fetch port; never completes if there is no fetch port.
pub(super) async fn next_fetch(port: &mut Option<FetchPort>) -> Result<FromPeer, Closed> {
    match port {
        Some(port) => port.server.recv().await,
        None => std::future::pending().await,
    }
}
