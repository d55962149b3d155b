//! Valkey and Redis: one server, or a cluster.

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, RedisConnectionInfo,
    RedisError, Value,
};
use tokio::sync::Mutex;
use tokio_rustls::rustls::crypto::ring;

use super::Settings;
use super::address::{Address, Node};
use super::backend::{Backend, BackendError};

/// A server or a cluster, with one connection for reads and one for writes: a read does not wait behind large writes.
#[derive(Debug)]
pub(super) struct Redis {
    target: Target,
    reads: Mutex<Option<Link>>,
    writes: Mutex<Option<Link>>,
}

enum Target {
    One(Client, AsyncConnectionConfig),
    Cluster(ClusterClient),
}

/// A connection. A clone is a second handle to the same one.
#[derive(Clone)]
enum Link {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Redis {
    pub(super) fn new(address: &Address, settings: &Settings) -> Result<Self, String> {
        let login = |database| RedisConnectionInfo {
            db: database,
            username: settings.credentials.username.clone(),
            password: settings.credentials.password.clone(),
            ..RedisConnectionInfo::default()
        };
        let wrong = |error: RedisError| format!("--remote {address}: {error}");
        let target = match address {
            Address::Redis {
                node,
                database,
                tls,
            } => {
                let client = Client::open(info(node, *tls, login(*database))).map_err(wrong)?;
                let config = AsyncConnectionConfig::new().set_connection_timeout(settings.timeout);
                Target::One(client, config)
            }
            Address::Cluster { nodes, tls } => {
                let nodes: Vec<_> = nodes.iter().map(|n| info(n, *tls, login(0))).collect();
                let client = ClusterClient::builder(nodes)
                    // The library's default of 16 would hold a request far beyond its bound. One covers a slot that has
                    // moved.
                    .retries(1)
                    .connection_timeout(settings.timeout)
                    .build()
                    .map_err(wrong)?;
                Target::Cluster(client)
            }
            Address::S3 { .. } => unreachable!("the caller has chosen the backend by its address"),
        };
        // The library takes the process's default. An error means that there is one already.
        ring::default_provider().install_default().ok();
        Ok(Self {
            target,
            reads: Mutex::default(),
            writes: Mutex::default(),
        })
    }

    /// Runs a command on the connection of a direction, which is opened if there is none.
    async fn ask(
        &self,
        direction: &Mutex<Option<Link>>,
        command: &Cmd,
    ) -> Result<Value, BackendError> {
        let mut link = {
            let mut kept = direction.lock().await;
            match &*kept {
                Some(link) => link.clone(),
                None => kept.insert(self.connect().await?).clone(),
            }
        };
        // If this future is dropped, the server is slow or hangs. Then the connection may be full of requests that
        // nobody waits for, so it is replaced.
        let mut guard = Replace(direction, true);
        let answer = match &mut link {
            Link::One(connection) => command.query_async(connection).await,
            Link::Cluster(connection) => command.query_async(connection).await,
        };
        guard.1 = match &answer {
            Ok(_) => false,
            // The server has answered, so the connection works.
            Err(error) => error.is_unrecoverable_error() || error.is_timeout(),
        };
        answer.map_err(|error: RedisError| BackendError::new(&error))
    }

    async fn connect(&self) -> Result<Link, BackendError> {
        let link = match &self.target {
            Target::One(client, config) => client
                .get_multiplexed_async_connection_with_config(config)
                .await
                .map(Link::One),
            Target::Cluster(client) => client.get_async_connection().await.map(Link::Cluster),
        };
        link.map_err(|error| BackendError::new(&error))
    }
}

impl Backend for Redis {
    fn get<'a>(
        &'a self,
        name: &'a str,
        most: usize,
    ) -> BoxFuture<'a, Result<Option<Bytes>, BackendError>> {
        async move {
            let mut command = redis::cmd("GETRANGE");
            // GET would send any length. A cut value is noticed by the caller, because its length is wrong. An absent
            // value has the range "".
            command.arg(name).arg(0).arg(most);
            match self.ask(&self.reads, &command).await? {
                Value::BulkString(value) if value.is_empty() => Ok(None),
                Value::BulkString(value) => Ok(Some(value.into())),
                Value::Nil => Ok(None),
                _ => Err(BackendError("the answer is not a value".to_owned())),
            }
        }
        .boxed()
    }

    fn put<'a>(
        &'a self,
        name: &'a str,
        parts: [Bytes; 2],
        life: Option<Duration>,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        async move {
            let mut command = redis::cmd("SET");
            command.arg(name).arg(parts.concat());
            drop(parts);
            if let Some(life) = life {
                let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
                // The server refuses 0 and numbers near its limit. The value has its deadline in any case.
                command.arg("PX").arg(life.clamp(1, MOST_LIFE_MS));
            }
            self.ask(&self.writes, &command).await.map(|_| ())
        }
        .boxed()
    }
}

/// Forgets a direction's connection when it is dropped, if the flag is set.
struct Replace<'a>(&'a Mutex<Option<Link>>, bool);

impl Drop for Replace<'_> {
    fn drop(&mut self) {
        // If the lock is held, another request is replacing the connection.
        if self.1
            && let Ok(mut kept) = self.0.try_lock()
        {
            *kept = None;
        }
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The library's own forms contain the password.
        f.write_str("Target")
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

fn info(node: &Node, tls: bool, redis: RedisConnectionInfo) -> ConnectionInfo {
    let addr = match tls {
        false => ConnectionAddr::Tcp(node.host.clone(), node.port),
        true => ConnectionAddr::TcpTls {
            host: node.host.clone(),
            port: node.port,
            insecure: false,
            tls_params: None,
        },
    };
    ConnectionInfo { addr, redis }
}

/// A hundred years.
const MOST_LIFE_MS: u64 = 100 * 365 * 24 * 3600 * 1000;
