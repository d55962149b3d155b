//! All tests of the crate's public interface, in one program, so that it is linked only once.

mod binary;
mod connectors;
mod control;
mod docs;
mod doors;
mod etcd;
mod failures;
mod legs;
mod limits;
mod links;
mod models;
mod newer;
mod passed;
/// Ports for the tests of all crates.
#[path = "../../../common/tests/all/ports.rs"]
mod ports;
mod realtime;
mod registration;
mod replaced;
mod shapes;
mod storm;
mod support;
mod tls;
mod unfit;
mod ways;
/// A ZeroMQ peer that sends plain bytes; the tests of the crate `common` use it, too.
#[allow(dead_code, reason = "these tests use a part of it")]
#[path = "../../../common/tests/all/zmtp.rs"]
mod zmtp;
