//! Simulation of the control connection between the two sidecars, and of its faults.

use protocol::message::{ToReceiver, ToSender};
use protocol::receiver::{self, Principal, Route};
use protocol::sender;
use protocol::{Epoch, Reason};
use rand::Rng;

use super::plan::{Fault, NetPlan};
use super::{Happening, MS, SECOND, World, new_receiver, new_sender, target};

/// Current connection. Messages on older connections never arrive.
pub(crate) struct Net {
    pub(crate) plan: NetPlan,
    route: Option<u64>,
    next_route: u64,
    /// Epoch of the receiver that the sender's link leads to.
    pub(crate) linked: u64,
    pub(crate) partitioned_until: u64,
    pub(crate) corrupt_next: bool,
    pub(crate) draining: bool,
}

/// A partition longer than the heartbeats' timeout ends the connection.
const HEARTBEAT_TIMEOUT: u64 = 6 * SECOND;

impl Net {
    pub(crate) fn new(plan: NetPlan) -> Self {
        Self {
            plan,
            route: None,
            next_route: 1,
            linked: 0,
            partitioned_until: 0,
            corrupt_next: false,
            draining: false,
        }
    }
}

impl World {
    pub(crate) fn make_link(&mut self) {
        let delay = self.jitter(MS, 20 * MS);
        self.after(delay, Happening::LinkMade(self.p_epoch));
    }

    pub(crate) fn link_made(&mut self, p_epoch: u64) {
        if p_epoch != self.p_epoch {
            return;
        }
        if self.now < self.net.partitioned_until {
            let event = sender::Event::LinkLost {
                to: target(),
                reason: Reason::NoLink,
            };
            self.after(SECOND / 2, Happening::ToSender(event, p_epoch));
            return;
        }
        // A new handshake makes a new connection, and the receiver notices the end of the old
        // connection.
        if let Some(route) = self.net.route.take() {
            self.lost_at_receiver(route);
        }
        self.net.route = Some(self.net.next_route);
        self.net.next_route += 1;
        self.net.linked = self.d_epoch;
        let event = sender::Event::Linked {
            to: target(),
            epoch: Epoch(self.d_epoch),
            v: 1,
            slots: self.d_slots,
            transport: if self.wire.guarded { "tcp" } else { "nixl" }.into(),
            cancels: false,
        };
        self.p.handle(protocol::Time(self.now), event);
    }

    /// Returns the delay of each copy of a message; empty if the message is lost.
    pub(crate) fn arrivals(&mut self) -> Vec<u64> {
        if self.now < self.net.partitioned_until {
            return Vec::new();
        }
        let plan = self.net.plan.clone();
        let mut copies = 1;
        copies -= usize::from(self.rng.random_range(0..100) < plan.lost);
        copies += usize::from(self.rng.random_range(0..100) < plan.doubled);
        let latest = u64::from(plan.delay_ms) * MS;
        (0..copies).map(|_| 50 + self.jitter(0, latest)).collect()
    }

    pub(crate) fn send_to_receiver(&mut self, message: &ToReceiver) {
        let Some(route) = self.net.route else {
            return;
        };
        self.overheard = match message {
            ToReceiver::Written(written) => Some(written.lease),
            ToReceiver::Writing(slots) => Some(slots.lease),
            ToReceiver::Extend(extend) => Some(extend.lease),
            _ => self.overheard,
        };
        for delay in self.arrivals() {
            self.after(delay, Happening::FromSender(route, message.clone()));
        }
    }

    pub(crate) fn send_to_sender(&mut self, route: Route, message: &ToSender) {
        if self.net.route != Some(route.0) {
            return;
        }
        for delay in self.arrivals() {
            self.after(delay, Happening::FromReceiver(route.0, message.clone()));
        }
    }

    pub(crate) fn deliver_to_receiver(&mut self, route: u64, message: ToReceiver) {
        if self.net.route == Some(route) {
            // The caller compares the checksums before it gives `Written` to the state machine.
            let corrupt = match &message {
                ToReceiver::Written(written) if self.net.corrupt_next => Some(written.lease),
                _ => None,
            };
            let event = match corrupt {
                Some(lease) => {
                    self.net.corrupt_next = false;
                    receiver::Event::Corrupt(lease)
                }
                None => receiver::Event::Peer {
                    route: Route(route),
                    message,
                },
            };
            self.connects(Route(route), "p");
            self.d.handle(protocol::Time(self.now), event);
        }
    }

    /// Tells the receiver which key a connection has proved, before the connection's first message.
    pub(crate) fn connects(&mut self, route: Route, principal: &str) {
        if self.keyed && !self.d.is_connected(route) {
            let event = receiver::Event::Connected {
                route,
                host: "10.0.0.1".to_owned(),
                principal: Some(Principal(principal.to_owned())),
            };
            self.d.handle(protocol::Time(self.now), event);
        }
    }

    pub(crate) fn deliver_to_sender(&mut self, route: u64, message: ToSender) {
        if self.net.route == Some(route) {
            let event = sender::Event::Peer {
                to: target(),
                message,
            };
            self.p.handle(protocol::Time(self.now), event);
        }
    }

    fn lost_at_receiver(&mut self, route: u64) {
        let event = receiver::Event::PeerLost {
            route: Route(route),
        };
        let delay = self.jitter(0, 5 * MS);
        self.after(delay, Happening::ToReceiver(event, self.d_epoch));
    }

    fn lost_at_sender(&mut self) {
        let event = sender::Event::LinkLost {
            to: target(),
            reason: Reason::PeerLost,
        };
        let delay = self.jitter(0, 5 * MS);
        self.after(delay, Happening::ToSender(event, self.p_epoch));
    }

    fn disconnect(&mut self) {
        if let Some(route) = self.net.route.take() {
            self.lost_at_receiver(route);
            self.lost_at_sender();
        }
    }

    fn replace_receiver(&mut self) {
        self.receiver_dies();
        self.decode.sidecar_died();
        self.d_epoch += 1;
        self.d = new_receiver(self.d_epoch, self.d_slots, &self.layout);
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::KillSender => {
                self.sender_dies();
                if let Some(route) = self.net.route.take() {
                    self.lost_at_receiver(route);
                }
                self.prefill.sidecar_died();
                self.p_epoch += 1;
                self.p = new_sender(self.p_epoch, self.p_slots, &self.layout);
            }
            Fault::KillReceiver => {
                if self.net.route.take().is_some() {
                    self.lost_at_sender();
                }
                self.replace_receiver();
            }
            Fault::SwapReceiver => {
                if self.net.route.is_some() {
                    self.net.route = Some(self.net.next_route);
                    self.net.next_route += 1;
                }
                self.replace_receiver();
            }
            Fault::KillPrefill => {
                // The end of the stream comes after the messages that the engine has sent.
                let gone = self.prefill.dies();
                self.tell_sender(sender::Event::EngineGone(gone));
            }
            Fault::KillDecode => {
                let gone = self.decode.dies();
                self.queue_dies();
                self.wire.reading.clear();
                self.tell_receiver(receiver::Event::EngineGone(gone));
            }
            Fault::Disconnect => self.disconnect(),
            Fault::Partition(ms) => {
                let length = u64::from(ms) * MS;
                self.net.partitioned_until = self.now + length;
                if length >= HEARTBEAT_TIMEOUT {
                    self.disconnect();
                }
            }
            Fault::FailWrite => self.wire.fail_next.push(false),
            Fault::LoseWrite => self.wire.fail_next.push(true),
            Fault::CorruptWrite => self.net.corrupt_next = true,
            Fault::Attack(attack) => self.wire.attack = Some(attack),
            Fault::Stranger => {
                self.stranger_asks();
                self.member_forges();
                self.stranger_fetches();
            }
            Fault::Drain => {
                self.net.draining = true;
                self.p
                    .handle(protocol::Time(self.now), sender::Event::Drain);
                self.d
                    .handle(protocol::Time(self.now), receiver::Event::Drain);
            }
        }
    }
}
