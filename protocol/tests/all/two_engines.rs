//! Simulates two engines that both prefill and decode, and that keep KV in their blocks for each
//! other.
//!
//! Each engine has a pool of blocks and one queue. As in vLLM, the head of the queue waits until
//! enough blocks are free. While the KV of a prefill request is kept, its blocks are not free. A
//! decode request needs blocks before it may fetch. So each engine can wait for blocks that become
//! free only when a request in the other engine's queue gets its KV.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use protocol::keep::{ToFetcher, ToKeeper};
use protocol::local::{Await, Expect, Keep, Keeper, OfRequest, Release, Staged, Target};
use protocol::receiver::{self, Receiver, Route};
use protocol::sender::{self, FetcherId, Sender};
use protocol::{EngineId, Epoch, Reason, RequestId, Time, Token};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::setup::{self, CHUNK, SECOND, keys};

const MS: u64 = 1000;
const ENGINE: EngineId = EngineId(1);
/// Maximum time for which KV is kept, milliseconds.
pub(crate) const MAX_KEEP_MS: u64 = 20_000;

/// One client request: one engine prefills, and the other engine decodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) at_ms: u16,
    pub(crate) prefill: usize,
    pub(crate) chunks: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) jobs: Vec<Job>,
    /// Number of blocks of each engine. A block holds one chunk.
    pub(crate) blocks: u32,
    /// Maximum number of blocks of each engine that hold kept KV.
    pub(crate) share: u32,
    pub(crate) slots: u32,
}

#[derive(Clone, Debug)]
enum Leg {
    Prefill(usize),
    /// The decode leg, with the token if the KV is kept.
    Decode(usize, Option<Token>),
}

#[derive(Debug)]
enum Happening {
    Arrives(usize, Leg),
    Computed(usize, usize),
    Over(usize, u32),
    Sender(usize, sender::Event),
    Receiver(usize, receiver::Event),
}

struct Node {
    p: Sender,
    d: Receiver,
    free: u32,
    kept: u32,
    queue: VecDeque<Leg>,
    /// Jobs whose KV this engine keeps.
    keeps: BTreeMap<usize, bool>,
}

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) fetched: usize,
    /// Number of jobs whose prompt the decode engine computed because no KV was kept.
    pub(crate) computed: usize,
    pub(crate) failed: Vec<Reason>,
    pub(crate) ended_ms: u64,
}

struct Cross {
    plan: Plan,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Happening>>,
    nodes: Vec<Node>,
    rng: StdRng,
    outcome: Outcome,
}

fn target(node: usize) -> Target {
    Target {
        host: node.to_string(),
        init_port: 1,
        alloc_port: 2,
    }
}

fn keeper(node: usize) -> Keeper {
    Keeper {
        host: node.to_string(),
        port: 3,
    }
}

fn node_of(host: &str) -> usize {
    host.parse().unwrap()
}

fn job_of(req: &RequestId) -> usize {
    req.0[1..].parse().unwrap()
}

fn epoch(node: usize) -> Epoch {
    Epoch(node as u64 + 1)
}

pub(crate) fn run(plan: &Plan) -> Outcome {
    let mut cross = Cross::new(plan.clone());
    cross.settle();
    cross.finish()
}

impl Cross {
    fn new(plan: Plan) -> Self {
        let node = |index: usize| Node {
            p: Sender::new(sender::Config {
                id: format!("n{index}"),
                epoch: epoch(index),
                max_requests: 64,
                ..setup::sender(plan.slots)
            }),
            d: Receiver::new(receiver::Config {
                epoch: epoch(index),
                max_requests: 64,
                address: Some(target(index)),
                max_expect: 60 * SECOND,
                ..setup::receiver(plan.slots)
            }),
            free: plan.blocks,
            kept: 0,
            queue: VecDeque::new(),
            keeps: BTreeMap::new(),
        };
        let mut cross = Self {
            now: 1,
            order: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            nodes: vec![node(0), node(1)],
            rng: StdRng::seed_from_u64(plan.seed),
            outcome: Outcome::default(),
            plan,
        };
        for (index, job) in cross.plan.jobs.clone().into_iter().enumerate() {
            let leg = Happening::Arrives(job.prefill, Leg::Prefill(index));
            cross.after(u64::from(job.at_ms) * MS, leg);
        }
        cross
    }

    fn after(&mut self, delay: u64, what: Happening) {
        self.order += 1;
        let event = (self.now + delay, self.order, self.events.len());
        self.queue.push(Reverse(event));
        self.events.push(Some(what));
    }

    fn soon(&mut self, what: Happening) {
        let delay = self.rng.random_range(100..20 * MS);
        self.after(delay, what);
    }

    fn settle(&mut self) {
        for _ in 0..200_000 {
            for node in 0..self.nodes.len() {
                self.act(node);
            }
            let due = self.queue.peek().map(|Reverse((time, ..))| *time);
            let timers = self.nodes.iter().enumerate().flat_map(|(index, node)| {
                let p = node.p.deadline().map(|t| (t.0, index, true));
                let d = node.d.deadline().map(|t| (t.0, index, false));
                p.into_iter().chain(d)
            });
            let timer = timers.min();
            let Some(next) = due.into_iter().chain(timer.map(|t| t.0)).min() else {
                return;
            };
            self.now = self.now.max(next);
            if due == Some(next) {
                let Some(Reverse((.., index))) = self.queue.pop() else {
                    return;
                };
                if let Some(event) = self.events[index].take() {
                    self.happen(event);
                }
            } else if let Some((_, node, is_sender)) = timer {
                let now = Time(self.now);
                if is_sender {
                    self.nodes[node].p.handle(now, sender::Event::Deadline);
                } else {
                    self.nodes[node].d.handle(now, receiver::Event::Deadline);
                }
            }
        }
        panic!("the two engines do not come to rest: {:?}", self.outcome);
    }

    fn happen(&mut self, event: Happening) {
        let now = Time(self.now);
        match event {
            Happening::Arrives(node, leg) => {
                if let Leg::Decode(job, Some(token)) = &leg {
                    self.expect(node, *job, token.clone());
                }
                self.nodes[node].queue.push_back(leg);
                self.schedule(node);
            }
            Happening::Computed(node, job) => self.computed(node, job),
            Happening::Over(node, blocks) => {
                self.nodes[node].free += blocks;
                self.schedule(node);
            }
            Happening::Sender(node, event) => self.nodes[node].p.handle(now, event),
            Happening::Receiver(node, event) => self.nodes[node].d.handle(now, event),
        }
    }

    /// Takes requests from the head of the queue as long as there are enough free blocks, and
    /// begins them.
    fn schedule(&mut self, node: usize) {
        while let Some(leg) = self.nodes[node].queue.front().cloned() {
            let (Leg::Prefill(job) | Leg::Decode(job, _)) = leg;
            let chunks = self.plan.jobs[job].chunks;
            if self.nodes[node].free < chunks {
                return;
            }
            self.nodes[node].free -= chunks;
            self.nodes[node].queue.pop_front();
            match leg {
                Leg::Prefill(job) => {
                    self.keep(node, job);
                    self.soon(Happening::Computed(node, job));
                }
                Leg::Decode(job, Some(token)) => {
                    self.expect(node, job, token);
                    self.park(node, job);
                }
                Leg::Decode(_, None) => {
                    self.outcome.computed += 1;
                    self.soon(Happening::Over(node, chunks));
                }
            }
        }
    }

    fn keep(&mut self, node: usize, job: usize) {
        let chunks = self.plan.jobs[job].chunks;
        let keep = Keep {
            req: format!("p{job}").as_str().into(),
            token: Token(format!("{job:032x}")),
            keys: keys(&job.to_string(), chunks),
            tokens: chunks * CHUNK,
            upto: chunks * CHUNK,
            keep_ms: 6000,
        };
        self.nodes[node].keeps.insert(job, false);
        let event = sender::Event::Keep(ENGINE, keep);
        self.nodes[node].p.handle(Time(self.now), event);
    }

    /// Answers a prefill request. The answer has a token if the share of the blocks has room for
    /// the request's KV.
    fn computed(&mut self, node: usize, job: usize) {
        let chunks = self.plan.jobs[job].chunks;
        let keeps = self.nodes[node].kept + chunks <= self.plan.share;
        let token = keeps.then(|| Token(format!("{job:032x}")));
        if keeps {
            self.nodes[node].kept += chunks;
            self.nodes[node].keeps.insert(job, true);
        } else {
            let req = format!("p{job}").as_str().into();
            let cancel = sender::Event::Cancel(ENGINE, OfRequest { req });
            self.nodes[node].p.handle(Time(self.now), cancel);
        }
        self.soon(Happening::Arrives(1 - node, Leg::Decode(job, token)));
    }

    fn expect(&mut self, node: usize, job: usize, token: Token) {
        let expect = Expect {
            req: format!("d{job}").as_str().into(),
            token,
            from: keeper(1 - node),
            epoch: epoch(1 - node),
            keep_ms: 6000,
        };
        let event = receiver::Event::Expect(ENGINE, expect);
        self.nodes[node].d.handle(Time(self.now), event);
    }

    fn park(&mut self, node: usize, job: usize) {
        let chunks = self.plan.jobs[job].chunks;
        let parked = Await {
            req: format!("d{job}").as_str().into(),
            keys: keys(&job.to_string(), chunks),
            tokens: chunks * CHUNK,
            have_tokens: 0,
            deadline_ms: 60_000,
            written: false,
        };
        let event = receiver::Event::Await(ENGINE, parked);
        self.nodes[node].d.handle(Time(self.now), event);
    }

    fn act(&mut self, node: usize) {
        while let Some(action) = self.nodes[node].p.poll_action() {
            self.sender_acts(node, action);
        }
        while let Some(action) = self.nodes[node].d.poll_action() {
            self.receiver_acts(node, action);
        }
    }

    fn sender_acts(&mut self, node: usize, action: sender::Action) {
        match action {
            sender::Action::Link { to } => {
                let linked = sender::Event::Linked {
                    epoch: epoch(node_of(&to.host)),
                    to,
                    v: 1,
                    slots: self.plan.slots,
                    transport: "tcp".into(),
                    cancels: false,
                };
                self.soon(Happening::Sender(node, linked));
            }
            sender::Action::Send { to, message } => {
                let route = Route(node as u64);
                let event = receiver::Event::Peer { route, message };
                self.soon(Happening::Receiver(node_of(&to.host), event));
            }
            sender::Action::Answer { to, message } => self.answer(node, to, message),
            sender::Action::Write { transfer, .. } => {
                let done = sender::Event::Done {
                    transfer,
                    sums: Vec::new(),
                    began: None,
                };
                self.soon(Happening::Sender(node, done));
            }
            sender::Action::Granted(_, granted) if !granted.chunks.is_empty() => {
                let staged = Staged {
                    req: granted.req,
                    chunks: granted.chunks,
                    gather_us: 0,
                    event: None,
                    layers: Vec::new(),
                };
                self.soon(Happening::Sender(
                    node,
                    sender::Event::Staged(ENGINE, staged),
                ));
            }
            sender::Action::Ended(_, ended) => {
                let job = job_of(&ended.req);
                let chunks = self.plan.jobs[job].chunks;
                let kept = self.nodes[node].keeps.remove(&job);
                if kept.expect("a kept request ends once") {
                    self.nodes[node].kept -= chunks;
                }
                self.soon(Happening::Over(node, chunks));
            }
            sender::Action::Progress(_) | sender::Action::Notify { .. } => {
                panic!("no proxy waits for a word: {action:?}")
            }
            sender::Action::Granted(..)
            | sender::Action::Watch { .. }
            | sender::Action::Record(_) => {}
        }
    }

    fn answer(&mut self, node: usize, to: FetcherId, message: ToFetcher) {
        let event = receiver::Event::Keeper {
            from: keeper(node),
            message,
        };
        let other = usize::try_from(to.0).unwrap();
        self.soon(Happening::Receiver(other, event));
    }

    fn ask(&mut self, node: usize, to: &Keeper, message: ToKeeper) {
        let from = FetcherId(node as u64);
        let event = sender::Event::Fetcher { from, message };
        self.soon(Happening::Sender(node_of(&to.host), event));
    }

    fn receiver_acts(&mut self, node: usize, action: receiver::Action) {
        match action {
            receiver::Action::Ask { to, message } => self.ask(node, &to, message),
            receiver::Action::Send { route, message } => {
                let to = target(node);
                let event = sender::Event::Peer { to, message };
                let other = usize::try_from(route.0).unwrap();
                self.soon(Happening::Sender(other, event));
            }
            receiver::Action::Ready(_, ready) => {
                let release = Release {
                    req: ready.req,
                    chunks: ready.chunks,
                    scatter_us: 0,
                };
                let event = receiver::Event::Release(ENGINE, release);
                self.soon(Happening::Receiver(node, event));
            }
            receiver::Action::Ended(_, ended) => {
                let chunks = self.plan.jobs[job_of(&ended.req)].chunks;
                match ended.reason {
                    None => self.outcome.fetched += 1,
                    // The decode engine computes the prompt in the blocks that the request already
                    // has.
                    Some(reason) => self.outcome.failed.push(reason),
                }
                self.soon(Happening::Over(node, chunks));
            }
            _ => {}
        }
    }

    fn finish(mut self) -> Outcome {
        let (fetched, computed) = (self.outcome.fetched, self.outcome.computed);
        let all = fetched + computed + self.outcome.failed.len();
        assert_eq!(all, self.plan.jobs.len(), "{:?}", self.outcome);
        for node in &self.nodes {
            assert!(node.queue.is_empty() && node.keeps.is_empty());
            assert_eq!((node.free, node.kept), (self.plan.blocks, 0));
            assert!(node.p.is_idle() && node.d.is_idle());
        }
        self.outcome.ended_ms = self.now / MS;
        self.outcome
    }
}
