//! Reads the KV events of engines, and asks engines for the tokens of prompts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::zmq::{Closed, Published, Replay, Subscriber};
use serde::Deserialize;
use tokio::select;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use crate::config::cli::KvEventsAt;
use crate::fleet::kv_events::{Applied, Batch};
use crate::openai::headers::call_headers;
use crate::routing::kv_index::Rank;
use crate::state::app::App;
use crate::state::tokenise::Question;
use crate::telemetry::labels::KvBatch;

/// The task that owns the connections to publishers of KV events.
pub(crate) struct KvEvents {
    app: Arc<App>,
    /// The connections to the ranks of each instance, by its id, with the instance's epoch.
    feeds: BTreeMap<String, (u64, Vec<AbortOnDropHandle<()>>)>,
    questions: mpsc::Receiver<Question>,
    asked: JoinSet<()>,
}

impl KvEvents {
    /// Returns the task of one proxy.
    pub(crate) fn new(app: Arc<App>, questions: mpsc::Receiver<Question>) -> Self {
        Self {
            app,
            feeds: BTreeMap::new(),
            questions,
            asked: JoinSet::new(),
        }
    }

    /// Runs until `stop` is cancelled.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut instances = self.app.instances.clone();
        loop {
            self.follow();
            select! {
                biased;
                () = stop.cancelled() => return,
                _ = instances.changed() => {}
                Some(done) = self.asked.join_next() => {
                    // A panic must not be lost.
                    if let Err(Ok(panic)) = done.map_err(tokio::task::JoinError::try_into_panic) {
                        std::panic::resume_unwind(panic);
                    }
                }
                Some(question) = self.questions.recv(), if self.asked.len() < MAX_ASKED => {
                    self.asked.spawn(ask(Arc::clone(&self.app), question));
                }
            }
        }
    }

    /// Connects to the publishers of new instances, and disconnects from the publishers of instances that are gone.
    fn follow(&mut self) {
        let instances = self.app.instances();
        let app = &self.app;
        self.feeds.retain(|id, (epoch, _)| {
            let stays = instances.iter().any(|i| i.id == *id && i.epoch == *epoch);
            if !stays {
                app.kv_index.remove(id);
            }
            stays
        });
        for instance in instances.iter() {
            if self.feeds.contains_key(&instance.id) {
                continue;
            }
            let Some(at) = KvEventsAt::of(&app.config.kv_events, instance) else {
                continue;
            };
            let ranks = app.kv_index.add(&instance.id, usize::from(at.ranks));
            let feeds = (0..at.ranks).map(|rank| {
                let feed = Feed {
                    app: Arc::clone(app),
                    id: instance.id.clone(),
                    host: at.host(instance).to_owned(),
                    port: at.port + rank,
                    replay: at.replay.map(|port| port + rank),
                    ranks: Arc::clone(&ranks),
                    rank: usize::from(rank),
                };
                AbortOnDropHandle::new(tokio::spawn(feed.run()))
            });
            let feeds = feeds.collect();
            self.feeds
                .insert(instance.id.clone(), (instance.epoch, feeds));
        }
    }
}

/// The connection to the publisher of one rank.
struct Feed {
    app: Arc<App>,
    id: String,
    host: String,
    port: u16,
    replay: Option<u16>,
    ranks: Arc<[Rank]>,
    rank: usize,
}

impl Feed {
    /// Receives events until the task is aborted.
    async fn run(self) {
        loop {
            if let Err(error) = self.receive().await {
                debug!(id = self.id, %error, "KV events: the socket is opened again");
            }
            sleep(REOPEN_AFTER).await;
        }
    }

    async fn receive(&self) -> Result<(), Closed> {
        let mut publisher = Subscriber::connect(&self.host, self.port, "").await?;
        loop {
            match publisher.recv().await? {
                Published::Connected => {
                    info!(id = self.id, rank = self.rank, "KV events: connected");
                    let next = self.held().connected();
                    self.replay(next).await;
                }
                Published::Odd => self.app.metrics.kv_batch(KvBatch::Malformed),
                Published::Numbered(number, bytes) => match Batch::read(&bytes) {
                    Ok(batch) => self.published(number, &batch).await,
                    // The next batch finds the gap.
                    Err(error) => {
                        self.app.metrics.kv_batch(KvBatch::Malformed);
                        debug!(id = self.id, number, %error, "KV events: message dropped");
                    }
                },
            }
        }
    }

    /// Applies a batch. Asks for batches that are missing first.
    async fn published(&self, number: u64, batch: &Batch) {
        let held = self.held();
        let applied = match held.published(number, batch) {
            Applied::Gap(from) => {
                self.app.metrics.kv_batch(KvBatch::Gap);
                self.replay(from).await;
                held.published(number, batch)
            }
            applied => applied,
        };
        self.app.metrics.kv_batch(match applied {
            Applied::Next => KvBatch::Applied,
            Applied::Old => KvBatch::Old,
            Applied::Gap(from) => {
                warn!(
                    id = self.id,
                    rank = self.rank,
                    from,
                    number,
                    "KV events are lost: the proxy guesses what the engine holds until its cache is cleared or it is \
                     started again; a replay endpoint prevents this"
                );
                held.lose(number);
                held.published(number, batch);
                KvBatch::Lost
            }
        });
    }

    /// Asks for the batches from this number on, if the publisher can send batches again.
    async fn replay(&self, from: u64) {
        let Some(port) = self.replay else {
            return;
        };
        let replayed = timeout(REPLAY_TIMEOUT, async {
            let mut replay = Replay::ask(&self.host, port, from).await?;
            for _ in 0..MAX_REPLAYED {
                let Some((number, bytes)) = replay.next().await? else {
                    break;
                };
                match Batch::read(&bytes) {
                    Ok(batch) => {
                        self.held().replayed(number, &batch);
                        self.app.metrics.kv_batch(KvBatch::Replayed);
                    }
                    Err(_) => self.app.metrics.kv_batch(KvBatch::Malformed),
                }
            }
            Ok::<_, Closed>(())
        });
        if !matches!(replayed.await, Ok(Ok(()))) {
            debug!(id = self.id, rank = self.rank, "KV events: no replay");
        }
    }

    fn held(&self) -> &Rank {
        &self.ranks[self.rank]
    }
}

/// Asks an engine for the tokens of a prompt, and remembers them.
async fn ask(app: Arc<App>, question: Question) {
    #[derive(Deserialize)]
    struct Tokenised {
        tokens: Vec<u32>,
    }
    let headers = call_headers(&app.config.access);
    let body: Bytes = question.body;
    let asked = app.client.ask(&question.url, json_headers(headers), body);
    let Ok(Ok(answer)) = timeout(ASK_TIMEOUT, asked).await else {
        return;
    };
    if let Ok(Tokenised { tokens }) = serde_json::from_slice(&answer.held) {
        app.kv_index.learn(&question.prompt, &tokens);
    }
}

fn json_headers(mut headers: http::HeaderMap) -> http::HeaderMap {
    headers.insert(http::header::CONTENT_TYPE, crate::openai::headers::JSON);
    headers
}

/// Maximum number of questions for tokens at a time: tokenising must not slow down an engine's HTTP server.
const MAX_ASKED: usize = 4;
/// Longest wait for the tokens of a prompt.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time until a socket that has ended is opened again.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// Longest wait for a replay.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of batches of one replay. vLLM keeps 10,000 batches by default.
const MAX_REPLAYED: usize = 100_000;
