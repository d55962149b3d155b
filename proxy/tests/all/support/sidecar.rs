//! A scripted sidecar as the proxy sees it: messages to the registration port, and an admin server.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http::StatusCode;
use protocol::registration::{
    InstanceRole, Leave, NotifX, Progress, ProxyNotif, Register, ToProxy,
};
use protocol::{Epoch, Reason, RequestId, codec};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::zmtp::{Hello, Peer};

pub use protocol::registration::InstanceRole as Role;

pub struct Sidecar {
    push: Arc<tokio::sync::Mutex<Peer>>,
    pub register: Register,
    answer: Arc<Mutex<Answer>>,
    /// The bodies of the call-backs so far.
    pub calls: Arc<Mutex<Vec<Value>>>,
    heartbeat: Option<AbortOnDropHandle<()>>,
    _admin: AbortOnDropHandle<()>,
}

/// The admin server's answer to a call-back.
#[derive(Clone, Debug)]
pub enum Answer {
    /// 200 with the sidecar's own id and epoch, and this readiness.
    Own { ready: bool },
    /// 409, as a sidecar with another id or epoch answers.
    Conflict,
    /// 200 with another id.
    OtherId,
    /// 200 with another epoch.
    OtherEpoch,
    /// Status 500.
    Broken,
}

struct Admin {
    id: String,
    epoch: u64,
    answer: Arc<Mutex<Answer>>,
    calls: Arc<Mutex<Vec<Value>>>,
}

impl Sidecar {
    /// Starts a sidecar that registers, renews its registration and answers call-backs properly.
    pub async fn start(name: &str, role: InstanceRole, http: &str, registration: &str) -> Self {
        let mut sidecar = Self::silent(name, role, http, registration).await;
        sidecar.beat();
        sidecar
    }

    /// Starts a sidecar as [`Sidecar::start`] does, with this epoch.
    pub async fn start_as(
        name: &str,
        epoch: u64,
        role: InstanceRole,
        http: &str,
        registration: &str,
    ) -> Self {
        let mut sidecar = Self::silent_as(name, epoch, role, http, registration).await;
        sidecar.beat();
        sidecar
    }

    /// Starts a sidecar that has a connection and an admin server, but does not register by itself.
    pub async fn silent(name: &str, role: InstanceRole, http: &str, registration: &str) -> Self {
        Self::silent_as(name, 7, role, http, registration).await
    }

    async fn silent_as(
        name: &str,
        epoch: u64,
        role: InstanceRole,
        http: &str,
        registration: &str,
    ) -> Self {
        let answer = Arc::new(Mutex::new(Answer::Own { ready: true }));
        let calls = Arc::default();
        let admin = Admin {
            id: name.into(),
            epoch,
            answer: Arc::clone(&answer),
            calls: Arc::clone(&calls),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin_url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/registered", post(registered))
            .with_state(Arc::new(admin));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        // The connection sends no heartbeats, so that it stays open although no task reads it.
        let hello = Hello {
            minor: 0,
            ..Hello::of("PUSH")
        };
        let address = registration.strip_prefix("tcp://").unwrap();
        // A proxy that a test has just started may not listen yet.
        let connect = async {
            loop {
                match Peer::connect(address, hello).await {
                    Ok(push) => return push,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        let push = tokio::time::timeout(super::PATIENCE, connect)
            .await
            .expect("the registration port does not listen");
        // Only an instance that decodes has ports for receivers.
        let receives = role != InstanceRole::Prefill;
        Self {
            push: Arc::new(tokio::sync::Mutex::new(push)),
            register: Register {
                id: name.into(),
                epoch: Epoch(epoch),
                role,
                http: http.into(),
                admin: admin_url,
                host: if receives {
                    "127.0.0.1".into()
                } else {
                    String::new()
                },
                init_ports: if receives { vec![7300, 7301] } else { vec![] },
                alloc_ports: if receives { vec![7400, 7401] } else { vec![] },
                ready: true,
                slots: 16,
                free_slots: 16,
                parked_tokens: 0,
                period_ms: 2000,
                ..Register::example()
            },
            answer,
            calls,
            heartbeat: None,
            _admin: AbortOnDropHandle::new(server),
        }
    }

    /// Registers now and every 100 ms from now on.
    pub fn beat(&mut self) {
        let push = Arc::clone(&self.push);
        let register = ToProxy::Register(self.register.clone());
        let beats = tokio::spawn(async move {
            // Sending fails after the proxy has ended.
            while send(&push, &register).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        self.heartbeat = Some(AbortOnDropHandle::new(beats));
    }

    /// Stops the heartbeat.
    pub fn fall_silent(&mut self) {
        self.heartbeat = None;
    }

    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    pub async fn say(&self, message: &ToProxy) {
        send(&self.push, message).await.unwrap();
    }

    pub async fn say_bytes(&self, frames: &[&[u8]]) {
        self.push.lock().await.send(frames).await.unwrap();
    }

    /// Sends the message which reports that the engine has begun this request.
    pub async fn progress(&self, id: &str) {
        self.say(&ToProxy::Progress(Progress {
            id: self.register.id.clone(),
            req_id: RequestId(id.into()),
            ..Progress::example()
        }))
        .await;
    }

    /// Sends the sender's notice about the KV of this request.
    pub async fn moved(&self, id: &str, bytes: u64, reason: Option<Reason>) {
        self.say(&ToProxy::ProxyNotif(ProxyNotif {
            req_id: RequestId(id.into()),
            x: Some(NotifX {
                ok: reason.is_none(),
                reason,
                bytes,
                us: 1500,
                transport: "nixl".into(),
                ..NotifX::example()
            }),
            ..ProxyNotif::example()
        }))
        .await;
    }

    pub async fn leave(&mut self) {
        self.fall_silent();
        self.say(&ToProxy::Leave(Leave {
            id: self.register.id.clone(),
            epoch: self.register.epoch,
        }))
        .await;
    }
}

async fn send(push: &tokio::sync::Mutex<Peer>, message: &ToProxy) -> std::io::Result<()> {
    let bytes = codec::encode(message);
    push.lock().await.send(&[&bytes]).await
}

async fn registered(State(admin): State<Arc<Admin>>, Json(body): Json<Value>) -> Response {
    admin.calls.lock().unwrap().push(body);
    let (id, epoch) = (&admin.id, admin.epoch);
    let own = |id: &str, epoch: u64, ready: bool| {
        let reason = if ready { "" } else { "no engine" };
        Json(json!({"id": id, "epoch": epoch, "ready": ready, "reason": reason})).into_response()
    };
    let answer = admin.answer.lock().unwrap().clone();
    match answer {
        Answer::Own { ready } => own(id, epoch, ready),
        Answer::Conflict => StatusCode::CONFLICT.into_response(),
        Answer::OtherId => own("somebody-else", epoch, true),
        Answer::OtherEpoch => own(id, epoch + 1, true),
        Answer::Broken => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
