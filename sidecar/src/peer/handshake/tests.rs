//! Tests of both sides over a real socket, and of the receiver's side alone.

use common::zmq::{FromPeer, MAX_INIT_BYTES, Protection, RouterServer};
use protocol::groups::Group;
use protocol::message::Advert;
use protocol::{Epoch, Layout};

use super::*;

fn identity(id: &str) -> Identity {
    let layout = Layout {
        model: "tiny".to_owned(),
        dtype: "bfloat16".to_owned(),
        layers: 2,
        kv_heads: 2,
        head_size: 16,
        mla: false,
        chunk_tokens: 256,
        ..Layout::example()
    };
    let slot_bytes = layout.chunk_bytes().unwrap();
    Identity {
        hello: Hello {
            id: id.to_owned(),
            epoch: Epoch(7),
            layout: Some(layout),
            transports: vec![Advert {
                kind: "tcp".to_owned(),
                address: "127.0.0.1:7600".to_owned(),
            }],
            host: "boot".to_owned(),
            pid: 1,
            seal: ByteBuf::new(),
            ended: Vec::new(),
            refused: None,
            ..Hello::example()
        },
        metadata: include_bytes!("../../../../protocol/fixtures/metadata_sender.bin").to_vec(),
        rows: (0..4)
            .map(|i| Row {
                address: 0x1000_0000 + i * slot_bytes,
                bytes: slot_bytes,
                device: 0,
            })
            .collect(),
        memory: Memory::Dram,
        pages: Pages {
            slots: 4,
            slot_bytes,
            ..Pages::example()
        },
    }
}

fn reply(request: &Init, ours: &Identity) -> Init {
    match answer(&codec::encode(request), ours) {
        Answer::Reply(bytes) => codec::decode(&bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Returns the two requests of LMCache's sender.
fn lmcache_requests() -> [Init; 2] {
    [
        Init::NixlInitRequest(NixlInitRequest {
            local_meta_bytes: ByteBuf::from(identity("lmcache").metadata),
            x: None,
            ..NixlInitRequest::example()
        }),
        Init::NixlMemRegRequest(NixlMemRegRequest {
            remote_agent_name: ByteBuf::from("sender-1111"),
            local_id: String::new(),
            local_xfer_dlist_bytes: ByteBuf::from(dlist::build(&[], Memory::Dram)),
            x: None,
            ..NixlMemRegRequest::example()
        }),
    ]
}

/// The deadline of a handshake. A busy machine answers within this time, too.
const DEADLINE: Duration = Duration::from_secs(5);

/// Runs a handshake against a receiver that answers with `serve`.
fn shake(sender: &Identity, mut serve: impl FnMut(&[u8]) -> Answer) -> Result<Linked, InitError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut server = RouterServer::bind("127.0.0.1", 0, MAX_INIT_BYTES, &Protection::Plain)
            .await
            .unwrap();
        let target = Target {
            host: "127.0.0.1".to_owned(),
            init_port: server.port(),
            alloc_port: 0,
        };
        let client = handshake(&target, sender, &Protection::Plain, DEADLINE);
        tokio::pin!(client);
        loop {
            tokio::select! {
                result = &mut client => return result,
                event = server.recv() => if let FromPeer::Message(route, request) = event.unwrap() {
                    match serve(&request) {
                        Answer::Reply(reply) => server.send(route, reply).unwrap(),
                        Answer::NotYet => {}
                        Answer::Malformed(_) => server.disconnect(route),
                    }
                }
            }
        }
    })
}

fn refused(sender: &Identity, receiver: &Identity) -> Refusal {
    match shake(sender, |request| answer(request, receiver)) {
        Err(InitError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ours_and_ours() {
    let (sender, receiver) = (identity("s"), identity("r"));
    let linked = shake(&sender, |request| answer(request, &receiver)).unwrap();
    assert_eq!(linked.hello, Some(receiver.hello));
    assert_eq!(linked.metadata, receiver.metadata);
    assert_eq!((linked.rows, linked.memory), (receiver.rows, Memory::Dram));
    assert_eq!(linked.pages, receiver.pages);
}

#[test]
fn ours_and_ours_without_nixl() {
    let without = |id| Identity {
        metadata: Vec::new(),
        rows: Vec::new(),
        ..identity(id)
    };
    let (sender, receiver) = (without("s"), without("r"));
    let linked = shake(&sender, |request| answer(request, &receiver)).unwrap();
    assert_eq!(linked.pages, receiver.pages);
    assert!(linked.rows.is_empty() && linked.metadata.is_empty());
}

#[test]
fn every_layout_field_that_differs_is_named_with_both_values() {
    let receiver = identity("r");
    let check = |change: fn(&mut Layout), field: &str, theirs: &str, ours: &str| {
        let mut sender = identity("s");
        change(sender.hello.layout.as_mut().unwrap());
        let refusal = refused(&sender, &receiver);
        assert_eq!(refusal.reason, Reason::LayoutMismatch);
        let expected = format!("{field}: s has {theirs}, r has {ours}");
        assert!(refusal.text.starts_with(&expected), "{}", refusal.text);
    };
    check(|l| l.model = "big".to_owned(), "model", "big", "tiny");
    check(|l| l.dtype = "half".to_owned(), "dtype", "half", "bfloat16");
    let (theirs, ours) = ("fp8_e4m3, scales 1", "");
    check(
        |l| l.quantization = "fp8_e4m3, scales 1".to_owned(),
        "quantization",
        theirs,
        ours,
    );
    check(|l| l.layers = 3, "layers", "3", "2");
    check(|l| l.kv_heads = 1, "kv_heads", "1", "2");
    check(|l| l.head_size = 64, "head_size", "64", "16");
    check(|l| l.mla = true, "mla", "true", "false");
    check(|l| l.chunk_tokens = 128, "chunk_tokens", "128", "256");
}

#[test]
fn version_engine_and_drain_refusals() {
    let (sender, receiver) = (identity("s"), identity("r"));

    let mut newer = sender.clone();
    newer.hello.v = 2;
    let refusal = refused(&newer, &receiver);
    assert_eq!(refusal.reason, Reason::VersionMismatch);
    assert!(
        refusal.text.contains("s speaks 2, r speaks 1"),
        "{}",
        refusal.text
    );

    let mut early = receiver.clone();
    early.hello.layout = None;
    assert_eq!(refused(&sender, &early).reason, Reason::NoEngine);

    let mut draining = receiver;
    let refusal = Refusal {
        reason: Reason::Draining,
        text: "stopping".to_owned(),
    };
    draining.hello.refused = Some(refusal.clone());
    assert_eq!(refused(&sender, &draining), refusal);
}

#[test]
fn lmcache_as_sender_gets_what_it_knows_in_any_order() {
    let receiver = identity("r");
    let [first, second] = lmcache_requests();
    for _ in 0..2 {
        let Init::NixlMemRegResponse(registered) = reply(&second, &receiver) else {
            panic!("another message");
        };
        assert_eq!(registered.x, None);
        assert_eq!(
            dlist::parse(&registered.remote_xfer_dlist_bytes),
            Ok((Memory::Dram, receiver.rows.clone()))
        );
        let Init::NixlInitResponse(introduced) = reply(&first, &receiver) else {
            panic!("another message");
        };
        assert_eq!(introduced.x, None);
        assert_eq!(&introduced.remote_agent_name[..], b"sender-1111");
        assert_eq!(introduced.remote_meta_bytes[..], receiver.metadata[..]);
    }
    let mut early = receiver;
    early.hello.layout = None;
    for request in lmcache_requests() {
        assert_eq!(answer(&codec::encode(&request), &early), Answer::NotYet);
    }
}

/// Answers as LMCache's receiver, which does not know `x`.
fn lmcache_receiver(request: &[u8], receiver: &Identity) -> Answer {
    let stripped = match codec::decode(request).unwrap() {
        Init::NixlInitRequest(r) => Init::NixlInitRequest(NixlInitRequest { x: None, ..r }),
        Init::NixlMemRegRequest(r) => {
            // LMCache's receiver closes its socket if its NIXL does not find a row, so the sender must send
            // exactly one row.
            let (_, rows) = dlist::parse(&r.local_xfer_dlist_bytes).unwrap();
            assert_eq!(rows.len(), 1);
            assert_eq!(&r.remote_agent_name[..], b"sender-1111");
            Init::NixlMemRegRequest(NixlMemRegRequest { x: None, ..r })
        }
        other => other,
    };
    answer(&codec::encode(&stripped), receiver)
}

#[test]
fn lmcache_as_receiver() {
    let (sender, receiver) = (identity("s"), identity("r"));
    let linked = shake(&sender, |request| lmcache_receiver(request, &receiver)).unwrap();
    assert_eq!(linked.hello, None);
    assert_eq!(linked.rows, receiver.rows);
    assert_eq!((linked.pages.v, linked.pages.slots), (0, 4));

    let mut other = receiver;
    for row in &mut other.rows {
        row.bytes *= 2;
    }
    match shake(&sender, |request| lmcache_receiver(request, &other)) {
        Err(error @ InitError::Refused { .. }) => {
            assert_eq!(error.reason(), Reason::LayoutMismatch);
            assert!(
                error
                    .to_string()
                    .contains("4 slots of 131072 bytes, a chunk here has 65536"),
                "{error}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn lmcache_gets_no_chunks_with_several_groups() {
    let (mut sender, receiver) = (identity("s"), identity("r"));
    let layout = sender.hello.layout.as_mut().unwrap();
    let bytes = layout.token_bytes().unwrap();
    layout.groups = vec![Group {
        kind: "full".to_owned(),
        bytes,
        size: 0,
    }];
    // A slot at the receiver has the size of the sender's chunk, so only the groups tell.
    assert_eq!(layout.chunk_bytes(), Some(receiver.pages.slot_bytes));
    let error = shake(&sender, |request| lmcache_receiver(request, &receiver)).unwrap_err();
    assert_eq!(error.reason(), Reason::LayoutMismatch);
    assert!(error.to_string().contains("groups: "), "{error}");
    // Two sidecars with the same groups fit.
    let (mut receiver, layout) = (receiver, sender.hello.layout.clone());
    receiver.hello.layout = layout;
    shake(&sender, |request| answer(request, &receiver)).unwrap();
}

#[test]
fn garbage_in_both_directions() {
    let (sender, receiver) = (identity("s"), identity("r"));
    let response = codec::encode(&Init::NixlMemRegResponse(NixlMemRegResponse {
        remote_xfer_dlist_bytes: ByteBuf::new(),
        x: None,
        ..NixlMemRegResponse::example()
    }));
    for bytes in [&b""[..], b"\x01\x02", b"\x80", &response] {
        assert!(matches!(answer(bytes, &receiver), Answer::Malformed(_)));
        match shake(&sender, |_| Answer::Reply(bytes.to_vec())) {
            Err(error @ InitError::Malformed { .. }) => {
                assert_eq!(error.reason(), Reason::NoLink);
            }
            other => panic!("{other:?}"),
        }
    }
    // The number of slots in `pages` contradicts the rows.
    let mut liar = receiver.clone();
    liar.pages.slots = 5;
    let error = shake(&sender, |request| answer(request, &liar)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its hello names 5 slots of 65536 bytes, but its list has 4"),
        "{error}"
    );
}

#[test]
fn silence_ends_at_the_deadline_and_a_hang_up_at_once() {
    let sender = identity("s");
    let error = shake(&sender, |_| Answer::NotYet).unwrap_err();
    assert!(matches!(error, InitError::Timeout { .. }), "{error}");
    let began = std::time::Instant::now();
    let error = shake(&sender, |_| Answer::Malformed(String::new())).unwrap_err();
    assert!(matches!(error, InitError::Unreached(_)), "{error}");
    assert!(began.elapsed() < DEADLINE);
}
