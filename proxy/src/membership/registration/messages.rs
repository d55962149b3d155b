//! Handles the messages on the registration ports.

use std::time::{Duration, Instant};

use common::identity::{Member, Role};
use common::zmq::Frame;
use protocol::RequestId;
use protocol::codec;
use protocol::receiver::Route;
use protocol::registration::{InstanceRole, Register, ToProxy};
use tracing::{debug, info, warn};

use super::{News, Registration};
use crate::fleet::instance::Instance;
use crate::fleet::p2p_nccl;
use crate::fleet::registry::Registered;
use crate::telemetry::labels::Message;

impl Registration {
    /// Handles the registration of a P2P NCCL instance.
    pub(super) fn on_p2p_hello(&mut self, frame: Frame) -> News {
        let (Frame::Single(bytes) | Frame::Last(bytes) | Frame::Of(_, _, bytes)) = frame else {
            self.app.metrics.message(Message::Malformed);
            return News::None;
        };
        let kind = match p2p_nccl::hello(&bytes) {
            Ok(instance) => self.name(instance),
            Err(error) => {
                debug!(%error, "malformed message of a P2P NCCL instance");
                Message::Malformed
            }
        };
        self.app.metrics.message(kind);
        match kind {
            Message::Register => News::Instances,
            _ => News::None,
        }
    }

    /// Registers a P2P NCCL instance, if the flags permit its address.
    fn name(&mut self, instance: Instance) -> Message {
        let (id, role) = (instance.id.clone(), instance.role);
        let permitted = self.app.config.access.check(instance.hosts());
        let now = Instant::now();
        let taken = permitted.and_then(|()| {
            let lease = Some(p2p_nccl::LEASE);
            self.registry
                .name(now, instance, lease)
                .map_err(|e| e.to_string())
        });
        match taken {
            Ok(Registered::New) => {
                info!(id, ?role, "P2P NCCL instance registered");
                Message::Register
            }
            Ok(Registered::Renewed) => Message::Register,
            Err(error) => {
                self.log_rate_limited(now, &error);
                Message::RegisterRefused
            }
        }
    }

    /// Logs a refused registration, at most once per 5 s. A sidecar repeats its registration every second,
    /// and an attacker can send registrations at any rate; without the limit, their log lines would fill the
    /// log.
    pub(super) fn log_rate_limited(&mut self, now: Instant, error: &str) {
        if self.warned.is_none_or(|at| at + WARN_EVERY <= now) {
            self.warned = Some(now);
            warn!(error, "registration refused");
        }
    }

    /// Decodes and handles a message on the sidecars' registration port.
    pub(super) fn take(&mut self, frame: Frame) -> News {
        let mut answered = None;
        let message = match frame {
            Frame::Of(member, route, bytes) => match codec::decode::<ToProxy>(&bytes) {
                Ok(message) => {
                    if let ToProxy::Register(register) = &message {
                        answered = Some((route, register.id.clone(), register.epoch.0));
                    }
                    may_say(&member, &message).map(|()| message)
                }
                Err(error) => Err(error.to_string()),
            },
            Frame::Single(bytes) => codec::decode::<ToProxy>(&bytes).map_err(|e| e.to_string()),
            Frame::Last(_) | Frame::Odd => Err("the message has more than one frame".into()),
        };
        match message {
            Ok(message) => self.heard(message, answered.map(|(route, ..)| route)),
            Err(error) => {
                if let Some((route, id, epoch)) = answered {
                    self.refuse(route, &id, epoch, &error);
                }
                self.app.metrics.message(Message::Malformed);
                self.log_rate_limited(Instant::now(), &error);
                debug!(error, "malformed message on the registration port");
                News::None
            }
        }
    }

    /// Handles a sidecar's message, and counts it by its kind. A sidecar with a `route` gets an answer to its registration.
    fn heard(&mut self, message: ToProxy, route: Option<Route>) -> News {
        let now = Instant::now();
        let kind = match message {
            ToProxy::Register(register) => {
                let (id, epoch) = (&register.id, register.epoch.0);
                match self.register(now, &register) {
                    Ok(known) => {
                        if known == Registered::New {
                            info!(id, epoch, role = ?register.role,
                                  http = register.http, admin = register.admin, "registered");
                        }
                        if let Some(route) = route {
                            let before = self.routes.insert((id.clone(), epoch), route);
                            if before != Some(route) {
                                self.tell_peers(route);
                            }
                            self.confirm(now, id, epoch);
                        }
                        Message::Register
                    }
                    Err(error) => {
                        if let Some(route) = route {
                            self.refuse(route, id, epoch, &error);
                        }
                        self.log_rate_limited(now, &error);
                        Message::RegisterRefused
                    }
                }
            }
            ToProxy::Leave(leave) => match self.registry.leave(now, &leave.id, leave.epoch.0) {
                Some(gone) => {
                    info!(id = gone.id, epoch = gone.epoch, "instance left");
                    Message::Leave
                }
                None => Message::Stray,
            },
            ToProxy::Progress(progress) => {
                // The first prompt of a list to begin is the request's begin.
                let id = RequestId::from(progress.req_id.of_client());
                if self.app.in_flight.begun(now, &id, &progress.id) {
                    Message::Progress
                } else {
                    Message::Stray
                }
            }
            ToProxy::ProxyNotif(notice) => {
                let (id, x) = (
                    RequestId::from(notice.req_id.of_client()),
                    notice.x.as_ref(),
                );
                if self.app.in_flight.moved(&id, x) || self.app.recent.amend(&id.0, x) {
                    self.app.metrics.notice(x);
                    Message::ProxyNotif
                } else {
                    Message::Stray
                }
            }
        };
        self.app.metrics.message(kind);
        match kind {
            Message::Register | Message::Leave => News::Instances,
            _ => News::None,
        }
    }

    /// Registers a sidecar's instance, if the message is valid and the flags permit its addresses.
    fn register(&mut self, now: Instant, message: &Register) -> Result<Registered, String> {
        let instance = Instance::parse(message).map_err(|e| e.to_string())?;
        self.app.config.access.check(instance.hosts())?;
        self.registry
            .register(now, message)
            .map_err(|e| e.to_string())
    }
}

/// Checks that a message concerns its sender: a name that the roster permits for its key, and a role and hosts that the
/// roster gives to it. A member of the roster must not register, remove or report for another member.
///
/// # Errors
/// The field that does not fit, and the cure.
fn may_say(member: &Member, message: &ToProxy) -> Result<(), String> {
    let id = match message {
        ToProxy::Register(register) => &register.id,
        ToProxy::Leave(leave) => &leave.id,
        ToProxy::Progress(progress) => &progress.id,
        ToProxy::ProxyNotif(_) => return Ok(()), // names only a request
    };
    if !member.is_called(id) {
        return Err(format!(
            "id: {} has proved its key, but the message is about {}",
            member.name,
            id.escape_debug()
        ));
    }
    let ToProxy::Register(register) = message else {
        return Ok(());
    };
    let needed: &[Role] = match register.role {
        InstanceRole::Prefill => &[Role::Sender],
        InstanceRole::Decode => &[Role::Receiver],
        InstanceRole::Both => &[Role::Sender, Role::Receiver],
    };
    if let Some(role) = needed.iter().find(|role| !member.roles.contains(role)) {
        return Err(format!(
            "role: {id} has no role {} in the roster; add it there",
            role.as_str()
        ));
    }
    let instance = Instance::parse(register).map_err(|e| e.to_string())?;
    match instance.hosts().find(|host| !member.is_at(host)) {
        Some(host) => Err(format!(
            "host: {id} announces {host}, which is none of its hosts in the roster; add it there"
        )),
        None => Ok(()),
    }
}

/// Shortest time between two log lines about refused registrations. The metric counts all refused
/// registrations.
const WARN_EVERY: Duration = Duration::from_secs(5);
