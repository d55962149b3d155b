//! Simulates a router that names no receiver: the prefill engine keeps the KV, and the decode side
//! fetches the KV with a token.
//!
//! The two engines know the request under different ids. The decode request may come late, twice or
//! never. It waits in its engine's queue before it parks.

use std::collections::{BTreeMap, BTreeSet};

use protocol::keep::{Fetch, Gone, OfToken, ToFetcher, ToKeeper};
use protocol::local::{Expect, Keep, Keeper, OfRequest, Target};
use protocol::sender::FetcherId;
use protocol::{Epoch, Reason, Token, receiver, sender};
use rand::Rng;

use super::engines::{Step, Turn};
use super::plan::{Park, RequestPlan};
use super::{Happening, MS, SECOND, World};

/// State of the router and of the decode engine for kept requests.
#[derive(Default)]
pub(crate) struct Legs {
    tokens: u128,
    /// Token of each kept request, by the prefill engine's id.
    kept: BTreeMap<String, Token>,
    /// Decode requests in the engine's queue, by the decode engine's id.
    queued: BTreeMap<String, Leg>,
    /// Decode requests that were aborted in the queue and whose `Ended` has not come yet.
    pub(crate) dismissed: BTreeSet<String>,
}

/// One decode request.
#[derive(Clone, Debug)]
pub(crate) struct Leg {
    plan: RequestPlan,
    token: Token,
    epoch: Epoch,
}

/// Time for which the engine asks the sidecar to keep KV, milliseconds.
const KEEP_MS: u32 = 4000;
/// Connection to the fetch port of a process that has no token.
const STRANGER: FetcherId = FetcherId(0);

pub(crate) fn keeper() -> Keeper {
    Keeper {
        host: "p".into(),
        port: 3,
    }
}

/// Returns the prefill engine's id of a kept request.
pub(crate) fn prefill_id(plan: &RequestPlan) -> String {
    if plan.kept {
        format!("p-{}", plan.name)
    } else {
        plan.name.clone()
    }
}

impl World {
    /// Returns the message with which the engine keeps the KV of a request.
    pub(crate) fn keep(&mut self, plan: &RequestPlan, upto: u32) -> Keep {
        self.legs.tokens += 1;
        let token = Token(format!("{:032x}", self.legs.tokens));
        let id = prefill_id(plan);
        self.legs.kept.insert(id.clone(), token.clone());
        Keep {
            req: id.as_str().into(),
            token,
            keys: self.keys(plan),
            tokens: plan.tokens,
            upto,
            keep_ms: KEEP_MS,
        }
    }

    /// Answers the prefill request. The router then sends one decode request, or two.
    pub(crate) fn answer(&mut self, plan: &RequestPlan) {
        let (Park::AtMs(delay) | Park::OnProgress(delay) | Park::OnNotify(delay)) = plan.park
        else {
            return;
        };
        let Some(token) = self.legs.kept.get(&prefill_id(plan)).cloned() else {
            return;
        };
        let leg = Leg {
            plan: plan.clone(),
            token,
            epoch: Epoch(self.p_epoch),
        };
        let ids = [
            Some(plan.name.clone()),
            plan.twice_ms.map(|_| format!("{}-b", plan.name)),
        ];
        let delays = [delay, delay.saturating_add(plan.twice_ms.unwrap_or(0))];
        for (id, delay) in ids.into_iter().zip(delays) {
            if let Some(id) = id {
                let turn = Turn::Queue(id, leg.clone());
                self.after(u64::from(delay) * MS, Happening::Decode(turn));
            }
        }
    }

    /// Puts a decode request into the engine's queue.
    pub(crate) fn queue(&mut self, id: String, leg: Leg) {
        let waits = self.legs.queued.contains_key(&id) || self.legs.dismissed.contains(&id);
        if waits || !self.decode.is_free(&id) {
            return;
        }
        self.expect(&id, &leg);
        let engine = self.decode.id;
        if let Some(ms) = leg.plan.abort_after_ms {
            let turn = Turn::Dismiss(id.clone(), engine);
            self.after(u64::from(ms) * MS, Happening::Decode(turn));
        }
        let wait = u64::from(leg.plan.queue_ms) * MS;
        self.legs.queued.insert(id.clone(), leg);
        self.after(wait, Happening::Decode(Turn::Park(id)));
    }

    fn expect(&mut self, id: &str, leg: &Leg) {
        let expect = Expect {
            req: id.into(),
            token: leg.token.clone(),
            from: keeper(),
            epoch: leg.epoch,
            keep_ms: KEEP_MS,
        };
        let engine = self.decode.id;
        self.tell_receiver(receiver::Event::Expect(engine, expect));
    }

    /// Takes a decode request out of the queue, because it has blocks now.
    pub(crate) fn unqueue(&mut self, id: &str) -> Option<RequestPlan> {
        let leg = self.legs.queued.remove(id)?;
        // The sidecar may have restarted since the request was queued.
        self.expect(id, &leg);
        Some(leg.plan)
    }

    /// Aborts a decode request that still waits in the queue.
    pub(crate) fn dismiss(&mut self, id: &str) {
        if self.legs.queued.remove(id).is_some() {
            self.legs.dismissed.insert(id.to_owned());
            let req = OfRequest { req: id.into() };
            let engine = self.decode.id;
            self.tell_receiver(receiver::Event::Abort(engine, req));
        }
    }

    pub(crate) fn queue_dies(&mut self) {
        self.legs.queued.clear();
        self.legs.dismissed.clear();
    }

    /// Carries a message to the fetch port. The port is the same after a restart.
    pub(crate) fn ask_keeper(&mut self, message: &ToKeeper) {
        let arrivals = self.arrivals();
        if arrivals.is_empty() && self.rng.random_range(0..4) == 0 {
            let lost = receiver::Event::KeeperLost {
                from: keeper(),
                reason: Reason::NoLink,
            };
            self.after(SECOND / 2, Happening::ToReceiver(lost, self.d_epoch));
        }
        for delay in arrivals {
            let event = sender::Event::Fetcher {
                from: FetcherId(self.d_epoch),
                message: message.clone(),
            };
            self.after(delay, Happening::ToKeeper(event));
        }
    }

    /// Lets a process without a token send messages to both ends of a connection to the fetch port.
    pub(crate) fn stranger_fetches(&mut self) {
        let req = format!("r{}", self.rng.random_range(0..4));
        for _ in 0..4 {
            // Half of the texts have the form of a token.
            let guess: u128 = self.rng.random();
            let token = Token(format!(
                "{guess:0width$x}",
                width = self.rng.random_range(31..33)
            ));
            let v = self.rng.random_range(0..3);
            let epoch = Epoch(self.p_epoch * self.rng.random_range(0..2));
            let of_token = OfToken {
                v,
                token: token.clone(),
                epoch,
                req: req.as_str().into(),
            };
            let to = Target {
                host: "anywhere".into(),
                init_port: 1,
                alloc_port: 2,
            };
            let message = match self.rng.random_range(0..3) {
                0 => ToKeeper::Renew(of_token),
                1 => ToKeeper::Drop(of_token),
                _ => ToKeeper::Fetch(Fetch {
                    v,
                    token: token.clone(),
                    epoch,
                    req: req.as_str().into(),
                    to,
                }),
            };
            let from = STRANGER;
            let event = sender::Event::Fetcher { from, message };
            self.p.handle(protocol::Time(self.now), event);
            // The decode side itself opens the connection to the fetch port that a request names.
            // So only the sidecar at this port can send the following message.
            let gone = ToFetcher::Gone(Gone {
                v,
                token,
                req: req.as_str().into(),
                reason: Reason::Unclaimed,
                retry_ms: self.rng.random_range(0..2),
            });
            let event = receiver::Event::Keeper {
                from: keeper(),
                message: gone,
            };
            self.d.handle(protocol::Time(self.now), event);
        }
    }

    pub(crate) fn keeper_answers(&mut self, to: FetcherId, message: &ToFetcher) {
        if to == STRANGER {
            let ToFetcher::Gone(gone) = message;
            let expected = [Reason::NotKept, Reason::StaleEpoch, Reason::VersionMismatch];
            if !expected.contains(&gone.reason) {
                self.fail(&format!("a stranger learns of a token: {gone:?}"));
            }
            return;
        }
        for delay in self.arrivals() {
            let event = receiver::Event::Keeper {
                from: keeper(),
                message: message.clone(),
            };
            self.after(delay, Happening::ToReceiver(event, to.0));
        }
    }

    /// Begins a kept request at the prefill engine.
    pub(crate) fn keep_step(&mut self, plan: &RequestPlan, upto: u32) {
        let keep = self.keep(plan, upto);
        let engine = self.prefill.id;
        self.tell_sender(sender::Event::Keep(engine, keep));
        self.prefill.reserved += 1;
        if let Some(ms) = plan.cancel_after_ms {
            let step = Step::Cancel(prefill_id(plan), engine);
            self.after(u64::from(ms) * MS, Happening::Prefill(step));
        }
    }
}
