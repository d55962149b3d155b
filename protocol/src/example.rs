//! One example of each message, for tests of all crates. The examples are the byte fixtures.
//!
//! A test sets the fields that it checks and takes all other fields from the example: `Written {
//! chunks, ..Written::example() }`. If a message gets a new optional field, no test and no line of
//! this file has to change. No code outside tests may call these functions.

use crate::Layout;
use crate::codec;
use crate::keep::{Fetch, Gone, OfToken, ToFetcher, ToKeeper};
use crate::local::{
    Await, Computing, Drain, Drained, EngineHello, Expect, Granted, Keep, Ready, Release, Reserve,
    Staged, ToEngine, ToSidecar, Welcome,
};
use crate::message::{
    Ack, AllocRequest, AllocResponse, AllocResponseX, AllocX, CancelNotif, CancelX, Extend, Hello,
    Init, More, NixlInitRequest, NixlInitResponse, NixlMemRegRequest, NixlMemRegResponse, Pages,
    Slots, ToReceiver, ToSender, Unwanted, Written,
};
use crate::registration::{
    FromProxy, NotifX, Peers, Progress, ProxyNotif, Register, Registered, ToProxy,
};

/// Defines `example` for each message type: the function decodes the type's fixture.
macro_rules! examples {
    ($($file:literal: $set:ident::$message:ident($type:ident),)*) => {$(
        impl $type {
            /// Returns the example of this message, which is the fixture
            #[doc = concat!("`", $file, ".bin`.")]
            pub fn example() -> Self {
                match codec::decode(include_bytes!(concat!("../fixtures/", $file, ".bin"))) {
                    Ok($set::$message(message)) => message,
                    other => unreachable!("fixture {} holds another message: {other:?}", $file),
                }
            }
        }
    )*};
}

examples! {
    "init_request": Init::NixlInitRequest(NixlInitRequest),
    "init_response": Init::NixlInitResponse(NixlInitResponse),
    "mem_reg_request": Init::NixlMemRegRequest(NixlMemRegRequest),
    "mem_reg_response": Init::NixlMemRegResponse(NixlMemRegResponse),
    "alloc_request": ToReceiver::AllocRequest(AllocRequest),
    "cancel_notif": ToReceiver::CancelNotif(CancelNotif),
    "writing": ToReceiver::Writing(Slots),
    "written": ToReceiver::Written(Written),
    "extend": ToReceiver::Extend(Extend),
    "alloc_response": ToSender::AllocResponse(AllocResponse),
    "more": ToSender::More(More),
    "ack": ToSender::Ack(Ack),
    "unwanted": ToSender::Unwanted(Unwanted),
    "hello": ToSidecar::Hello(EngineHello),
    "reserve": ToSidecar::Reserve(Reserve),
    "keep": ToSidecar::Keep(Keep),
    "expect": ToSidecar::Expect(Expect),
    "fetch": ToKeeper::Fetch(Fetch),
    "renew": ToKeeper::Renew(OfToken),
    "gone": ToFetcher::Gone(Gone),
    "computing": ToSidecar::Computing(Computing),
    "staged": ToSidecar::Staged(Staged),
    "await": ToSidecar::Await(Await),
    "release": ToSidecar::Release(Release),
    "welcome": ToEngine::Welcome(Welcome),
    "granted": ToEngine::Granted(Granted),
    "ready": ToEngine::Ready(Ready),
    "drain": ToSidecar::Drain(Drain),
    "drained": ToEngine::Drained(Drained),
    "register": ToProxy::Register(Register),
    "registered": FromProxy::Registered(Registered),
    "peers": FromProxy::Peers(Peers),
    "progress": ToProxy::Progress(Progress),
    "proxy_notif": ToProxy::ProxyNotif(ProxyNotif),
}

/// Defines `example` for each map inside a message: the function takes the map from the message's
/// example.
macro_rules! parts {
    ($($whole:ident.$field:ident: $type:ident,)*) => {$(
        impl $type {
            /// Returns the example of this map, which is
            #[doc = concat!("`", stringify!($whole), "::example().", stringify!($field), "`.")]
            pub fn example() -> Self {
                let part: Option<Self> = $whole::example().$field.into();
                part.expect("the fixture has this optional map")
            }
        }
    )*};
}

parts! {
    EngineHello.layout: Layout,
    NixlInitResponse.x: Hello,
    NixlMemRegResponse.x: Pages,
    AllocRequest.x: AllocX,
    AllocResponse.x: AllocResponseX,
    CancelNotif.x: CancelX,
    ProxyNotif.x: NotifX,
}
