//! The proxy's answers on the registration port. Only sidecars that have proved a key get answers: the others have PUSH
//! sockets, which read nothing.

use std::time::Instant;

use protocol::codec;
use protocol::receiver::Route;
use protocol::registration::{FromProxy, Registered};
use protocol::{Epoch, VERSION};

use super::Registration;

impl Registration {
    /// Tells a sidecar that its registration is refused.
    pub(super) fn refuse(&mut self, route: Route, id: &str, epoch: u64, why: &str) {
        self.answer(
            route,
            id,
            epoch,
            false,
            &format!("registration refused: {why}"),
        );
    }

    /// Tells a sidecar whether its registration is confirmed, and why the last call-back failed.
    pub(super) fn confirm(&mut self, now: Instant, id: &str, epoch: u64) {
        let Some(&route) = self.routes.get(&(id.to_owned(), epoch)) else {
            return;
        };
        let (confirmed, trouble) = self.registry.confirmation(now, id, epoch);
        self.answer(route, id, epoch, confirmed, &trouble);
    }

    fn answer(&mut self, route: Route, id: &str, epoch: u64, confirmed: bool, trouble: &str) {
        let registered = FromProxy::Registered(Registered {
            v: VERSION,
            id: id.to_owned(),
            epoch: Epoch(epoch),
            confirmed,
            trouble: trouble.chars().take(MAX_TROUBLE).collect(),
        });
        // If the connection has ended, or the sidecar does not read, the answer to its next heartbeat says the same.
        self.inputs
            .port
            .answer(route, codec::encode(&registered))
            .ok();
    }

    /// Forgets the connections of instances that are gone.
    pub(super) fn forget_routes(&mut self) {
        let Self {
            routes, registry, ..
        } = self;
        routes.retain(|(id, epoch), _| registry.holds(id, *epoch));
    }
}

/// Longest text of an answer, in characters.
const MAX_TROUBLE: usize = 512;
