//! A scripted OpenAI server.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures::StreamExt;
use futures::stream;
use http::HeaderMap;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::journal::Journal;

/// The scripted reaction of an engine to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Answers with this status and JSON.
    Json(u16, Value),
    /// Answers as `Json` does, but only after a call of `Engine::release`.
    Held(u16, Value),
    /// Streams these chunks. The value of `Then` says how the stream continues.
    Stream(Vec<String>, Then),
    /// Never answers.
    Silence,
    /// Closes the connection without an answer.
    Die,
}

/// The continuation of a stream after its chunks.
#[derive(Clone, Copy, Debug)]
pub enum Then {
    End,
    Hang,
    /// Breaks the connection after a call of `Engine::release`.
    Break,
    /// Sends this text again every few milliseconds.
    Repeat(&'static str),
}

/// A request as the engine received it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// The path and the query.
    pub path: String,
    pub headers: HeaderMap,
    pub text: String,
}

pub struct Engine {
    pub url: String,
    inner: Arc<Inner>,
    _server: AbortOnDropHandle<()>,
}

struct Inner {
    name: String,
    journal: Arc<Journal>,
    prefill: Mutex<Reply>,
    decode: Mutex<Reply>,
    seen: Mutex<Vec<Seen>>,
    released: Semaphore,
    health: Mutex<u16>,
    models: Mutex<Value>,
}

impl Engine {
    pub async fn start(name: &str, journal: Arc<Journal>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let inner = Arc::new(Inner {
            name: name.into(),
            journal,
            prefill: Mutex::new(Reply::Json(200, completion("x", 5, 1))),
            decode: Mutex::new(Reply::Json(200, completion("hello", 5, 3))),
            seen: Mutex::default(),
            released: Semaphore::new(0),
            health: Mutex::new(200),
            models: Mutex::new(json!([{"id": "m"}])),
        });
        let router = Router::new().fallback(serve).with_state(Arc::clone(&inner));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            url,
            inner,
            _server: AbortOnDropHandle::new(server),
        }
    }

    /// Starts an engine that is not registered, with its own journal.
    pub async fn alone(name: &str) -> Self {
        Self::start(name, Arc::default()).await
    }

    pub fn journal(&self) -> Arc<Journal> {
        Arc::clone(&self.inner.journal)
    }

    pub fn on_prefill(&self, reply: Reply) {
        *self.inner.prefill.lock().unwrap() = reply;
    }

    pub fn on_decode(&self, reply: Reply) {
        *self.inner.decode.lock().unwrap() = reply;
    }

    /// Sets the status of `/health`.
    pub fn set_health(&self, status: u16) {
        *self.inner.health.lock().unwrap() = status;
    }

    /// Sets the list of models: the name of the model, and the names of its adapters.
    pub fn set_models(&self, model: &str, adapters: &[&str]) {
        let adapters = adapters.iter().map(|id| json!({"id": id, "parent": model}));
        let all = std::iter::once(json!({"id": model})).chain(adapters);
        *self.inner.models.lock().unwrap() = all.collect();
    }

    /// Releases one held answer, or breaks one connection.
    pub fn release(&self) {
        self.inner.released.add_permits(1);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    /// Returns the only request so far.
    pub fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }
}

impl Seen {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    pub fn id(&self) -> String {
        self.headers["x-request-id"].to_str().unwrap().to_owned()
    }
}

/// Returns the body of a completion that is not streamed.
pub fn completion(text: &str, prompt_tokens: u64, completion_tokens: u64) -> Value {
    json!({
        "object": "text_completion",
        "choices": [{"index": 0, "text": text}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        "kv_transfer_params": null,
    })
}

/// Returns the events of a streamed completion, with `[DONE]`.
pub fn events(words: &[&str]) -> Vec<String> {
    let event = |word: &&str| format!("data: {}\n\n", json!({"choices": [{"text": word}]}));
    let mut events: Vec<_> = words.iter().map(event).collect();
    events.push("data: [DONE]\n\n".into());
    events
}

/// Handles a request as the script says, and writes its begin and its end into the journal.
async fn serve(State(engine): State<Arc<Inner>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let seen = Seen {
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: head.headers,
        text: String::from_utf8(bytes.to_vec()).unwrap(),
    };
    if seen.path == "/health" {
        return answer(*engine.health.lock().unwrap(), &Value::Null);
    }
    // Only a question that a client has asked has an id. The proxy also asks by itself.
    if seen.path != "/v1/models" || seen.headers.contains_key("x-request-id") {
        engine.seen.lock().unwrap().push(seen.clone());
    }
    if seen.path == "/tokenize" {
        return answer(
            200,
            &json!({"count": 3, "max_model_len": 64, "tokens": [5, 6, 7]}),
        );
    }
    if seen.path == "/v1/models" {
        let models = engine.models.lock().unwrap().clone();
        return answer(200, &json!({"object": "list", "data": models}));
    }
    // The transfer parameters show which leg this is.
    let body: Value = serde_json::from_str(&seen.text).unwrap_or_default();
    let params = &body["kv_transfer_params"];
    let (leg, reply) = if params["do_remote_decode"] == true || params["ret_first_tok"] == true {
        ("prefill", &engine.prefill)
    } else if params["do_remote_prefill"] == true {
        ("decode", &engine.decode)
    } else {
        ("alone", &engine.decode)
    };
    let reply = reply.lock().unwrap().clone();
    engine.journal.write(format!("{} {leg}", engine.name));
    // If the other side closes the connection, this value is dropped before the request is served.
    let mut presence = Presence {
        engine: Arc::clone(&engine),
        leg,
        served: false,
    };
    match reply {
        Reply::Json(status, value) => {
            presence.served();
            answer(status, &value)
        }
        Reply::Held(status, value) => {
            engine.released.acquire().await.unwrap().forget();
            presence.served();
            answer(status, &value)
        }
        Reply::Silence => std::future::pending().await,
        Reply::Die => {
            presence.served();
            // The panic ends the connection's task before any head is written.
            std::panic::resume_unwind(Box::new("scripted death"));
        }
        Reply::Stream(chunks, then) => {
            let chunks = stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>));
            if let Then::Repeat(text) = then {
                let presence = Arc::new(presence);
                let again = stream::unfold(presence, move |presence| async move {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    Some((Ok(text.to_owned()), presence))
                });
                return Response::builder()
                    .header("content-type", "text/event-stream; charset=utf-8")
                    .body(Body::from_stream(chunks.chain(again)))
                    .unwrap();
            }
            // The end of the stream decides whether the request counts as served.
            let end = stream::once(async move {
                match then {
                    Then::End => presence.served(),
                    Then::Hang | Then::Repeat(_) => std::future::pending().await,
                    Then::Break => {
                        engine.released.acquire().await.unwrap().forget();
                        presence.served();
                        return Err(std::io::Error::other("scripted break"));
                    }
                }
                Ok(String::new())
            });
            Response::builder()
                .header("content-type", "text/event-stream; charset=utf-8")
                .body(Body::from_stream(chunks.chain(end)))
                .unwrap()
        }
    }
}

fn answer(status: u16, value: &Value) -> Response {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Body::from(value.to_string()))
        .unwrap()
}

struct Presence {
    engine: Arc<Inner>,
    leg: &'static str,
    served: bool,
}

impl Presence {
    fn served(&mut self) {
        self.served = true;
        let (name, leg) = (&self.engine.name, self.leg);
        self.engine.journal.write(format!("{name} {leg} served"));
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if !self.served {
            let (name, leg) = (&self.engine.name, self.leg);
            self.engine.journal.write(format!("{name} {leg} aborted"));
        }
    }
}
