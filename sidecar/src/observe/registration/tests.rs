use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use common::zmq::{Frame, Inbox, Protection};
use protocol::RequestId;
use protocol::registration::{PROXY_NAME, Progress, ProxyNotif, Register};
use tokio::sync::mpsc::UnboundedSender;

use super::*;
use crate::config::{HostPort, ProxyAddress};
use crate::observe::metrics::Metrics;
use crate::observe::proxy_discovery::ProxyDiscovery;
use crate::observe::status::tests::{config, gauges, slot_layout};
use crate::rank::context::RankRole;

/// An outlet that accepts messages until the test sets it to full.
struct Scripted {
    taken: UnboundedSender<ToProxy>,
    full: Arc<Mutex<bool>>,
}

impl Outlet for Scripted {
    fn send(&mut self, payload: Vec<u8>) -> Result<(), Refused> {
        if *self.full.lock().unwrap() {
            return Err(Refused);
        }
        let message = codec::decode(&payload).expect("what we encode");
        self.taken.send(message).map_err(|_| Refused)
    }

    fn listener(&mut self) -> BoxFuture<'_, Listener> {
        Box::pin(std::future::ready(Listener::Proxy))
    }

    fn heard(&mut self) -> BoxFuture<'_, Bytes> {
        Box::pin(std::future::pending())
    }

    fn close(self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

struct Fixture {
    status: Arc<Status>,
    metrics: Arc<Metrics>,
    voice: ProxyVoice,
    taken: mpsc::UnboundedReceiver<ToProxy>,
    full: Arc<Mutex<bool>>,
    drain: CancellationToken,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Fixture {
    fn start() -> Self {
        let config = Arc::new(config(&[]));
        let status = Arc::new(Status::new(&config));
        let metrics = Arc::new(Metrics::new(&status));
        let (sender, taken) = mpsc::unbounded_channel();
        let full = Arc::new(Mutex::new(false));
        let outlet = Scripted {
            taken: sender,
            full: Arc::clone(&full),
        };
        let (voice, task) = Registration::new(
            outlet,
            config,
            7900,
            Arc::clone(&status),
            metrics.proxy.clone(),
        );
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let task = tokio::spawn(task.run(drain.clone(), stop.clone()));
        Self {
            status,
            metrics,
            voice,
            taken,
            full,
            drain,
            stop,
            task,
        }
    }

    async fn next(&mut self) -> ToProxy {
        let next = tokio::time::timeout(Duration::from_secs(5), self.taken.recv());
        next.await.expect("in time").expect("still running")
    }

    async fn register(&mut self) -> Register {
        match self.next().await {
            ToProxy::Register(register) => register,
            other => panic!("{other:?}"),
        }
    }

    fn progress(&self) {
        self.voice.tell(progress());
    }
}

fn progress() -> ToProxy {
    ToProxy::Progress(Progress {
        id: "d0".to_owned(),
        req_id: RequestId::from("r1"),
        ..Progress::example()
    })
}

#[tokio::test(start_paused = true)]
async fn registers_at_once_and_at_every_period() {
    let mut f = Fixture::start();
    let begin = tokio::time::Instant::now();
    for period in 0..4 {
        let register = f.register().await;
        assert_eq!((register.id.as_str(), register.ready), ("d0", false));
        assert_eq!(begin.elapsed().as_millis(), period * 50);
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_readiness_is_told_at_once() {
    let mut f = Fixture::start();
    f.register().await;
    let begin = tokio::time::Instant::now();
    f.status.bound();
    assert!(!f.register().await.ready);
    let slot_layout = slot_layout();
    for rank in 0..2 {
        f.status
            .gauges(RankRole::Receiver, rank, &gauges(Some(&slot_layout), 1));
    }
    assert!(f.register().await.ready);
    assert_eq!(begin.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn leaves_when_draining_and_still_carries_what_sides_say() {
    let mut f = Fixture::start();
    let epoch = f.register().await.epoch;
    f.drain.cancel();
    let ToProxy::Leave(leave) = f.next().await else {
        panic!("expected Leave");
    };
    assert_eq!((leave.id.as_str(), leave.epoch), ("d0", epoch));
    tokio::time::sleep(Duration::from_secs(1)).await;
    f.progress();
    assert_eq!(f.next().await, progress(), "and no Register in that second");
    f.stop.cancel();
    f.task.await.unwrap();
    assert_eq!(f.taken.recv().await, None, "it leaves once");
}

#[tokio::test(start_paused = true)]
async fn a_stop_without_a_drain_flushes_and_leaves_too() {
    let mut f = Fixture::start();
    f.register().await;
    f.progress();
    f.stop.cancel();
    f.task.await.unwrap();
    assert_eq!(f.taken.recv().await, Some(progress()));
    assert!(matches!(f.taken.recv().await, Some(ToProxy::Leave(_))));
    assert_eq!(f.taken.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_takes_nothing_costs_messages_and_never_a_wait() {
    let mut f = Fixture::start();
    f.register().await;
    *f.full.lock().unwrap() = true;
    for _ in 0..QUEUE + 100 {
        f.progress();
    }
    // The task has not run yet, so every message beyond the queue's length is dropped at once.
    let dropped = "pd_sidecar_proxy_messages_total{kind=\"progress\",fate=\"dropped\"} ";
    let count = |metrics: &Metrics| {
        let text = metrics.text();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(dropped).map(str::to_owned));
        line.expect("counted").parse::<usize>().unwrap()
    };
    assert_eq!(count(&f.metrics), 100);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(count(&f.metrics), QUEUE + 100);
    *f.full.lock().unwrap() = false;
    f.register().await;
}

#[tokio::test]
async fn reaches_a_real_port() {
    let mut pull = Inbox::pull(PROXY_NAME, LOCAL.into(), &Protection::Plain)
        .await
        .unwrap();
    let at = ProxyAddress::At(HostPort {
        host: "127.0.0.1".to_owned(),
        port: pull.address().port(),
    });
    let (outlet, _) = ProxyDiscovery::of(&at, None).await.unwrap();
    let config = Arc::new(config(&[]));
    let status = Arc::new(Status::new(&config));
    let metrics = Arc::new(Metrics::new(&status));
    let (voice, task) = Registration::new(outlet, config, 7900, status, metrics.proxy.clone());
    let stop = CancellationToken::new();
    let task = tokio::spawn(task.run(CancellationToken::new(), stop.clone()));
    let mut kinds = Vec::new();
    let mut recv = async || {
        let bytes = tokio::time::timeout(Duration::from_secs(60), single(&mut pull)).await;
        kind(&codec::decode(&bytes.unwrap()).unwrap())
    };
    kinds.push(recv().await);
    voice.tell(progress());
    while kinds.last() != Some(&"progress") {
        kinds.push(recv().await);
    }
    stop.cancel();
    while kinds.last() != Some(&"leave") {
        kinds.push(recv().await);
    }
    task.await.unwrap();
    assert_eq!(kinds[0], "register");
}

/// LMCache's proxy has a PULL socket and does not call back. When this proxy receives a message that it
/// does not know, it closes the socket for ever. So after a `Register`, the proxy's clients would wait
/// for their answers without end.
#[tokio::test]
async fn lmcaches_proxy_hears_its_own_messages_alone_and_readiness_does_not_wait_for_it() {
    let mut pull = Inbox::pull("", LOCAL.into(), &Protection::Plain)
        .await
        .unwrap();
    let at = ProxyAddress::At(HostPort {
        host: "127.0.0.1".to_owned(),
        port: pull.address().port(),
    });
    let (outlet, _) = ProxyDiscovery::of(&at, None).await.unwrap();
    let config = Arc::new(config(&[]));
    let status = Arc::new(Status::new(&config));
    let metrics = Arc::new(Metrics::new(&status));
    status.bound();
    let layout = slot_layout();
    for rank in 0..2 {
        status.gauges(RankRole::Receiver, rank, &gauges(Some(&layout), 1));
    }
    let (voice, task) = Registration::new(
        outlet,
        config,
        7900,
        Arc::clone(&status),
        metrics.proxy.clone(),
    );
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let task = tokio::spawn(task.run(drain.clone(), stop.clone()));
    let end = Instant::now() + Duration::from_secs(60);
    let obstacles = loop {
        let obstacles = status.obstacles(Instant::now());
        if obstacles.is_empty() || Instant::now() > end {
            break obstacles;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    voice.tell(progress());
    voice.tell(notif());
    drain.cancel();
    stop.cancel();
    let bytes = tokio::time::timeout(Duration::from_secs(60), single(&mut pull)).await;
    let first: ToProxy = codec::decode(&bytes.unwrap()).unwrap();
    task.await.unwrap();
    let rest = tokio::time::timeout(Duration::from_millis(100), single(&mut pull)).await;
    assert_eq!((kind(&first), obstacles), ("proxy_notif", Vec::new()));
    assert!(rest.is_err(), "{rest:?}");
}

/// Returns the next message of a registration port.
async fn single(port: &mut Inbox) -> Bytes {
    match port.recv().await.unwrap() {
        Frame::Single(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

/// Any free port of this host.
const LOCAL: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn notif() -> ToProxy {
    ToProxy::ProxyNotif(ProxyNotif {
        req_id: RequestId::from("r1"),
        x: None,
        ..ProxyNotif::example()
    })
}
