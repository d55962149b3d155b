use std::sync::Arc;

use protocol::registration::InstanceRole;

use super::*;
use crate::connectors::Connector;
use crate::fleet::instance::{Instance, Named, Source};
use crate::fleet::load::LoadSnapshot;

fn instance(role: InstanceRole) -> Arc<Instance> {
    let named = Named {
        role,
        url: "http://d:1".into(),
        id: None,
        connector: Connector::Nixl,
        host: None,
        init_ports: Vec::new(),
        alloc_ports: Vec::new(),
        zmq: None,
        models: Vec::new(),
    };
    Arc::new(Instance::named(&named, Source::Added).unwrap())
}

#[test]
fn what_is_measured_decides() {
    let (p, d) = (
        instance(InstanceRole::Prefill),
        instance(InstanceRole::Decode),
    );
    let candidate = |instance| Candidate {
        instance,
        load: LoadSnapshot::default(),
        held: 0,
    };
    let busy = Candidate {
        load: LoadSnapshot {
            legs: 4,
            ..LoadSnapshot::default()
        },
        ..candidate(&d)
    };
    let measured = Measured::default();
    let stays = |tokens| {
        let costs = measured.costs();
        costs.local_is_cheaper(tokens, &busy, &candidate(&p))
    };
    // A token costs 50 µs on the prefill instance and 100 µs on the busy decode instance. So a hand-over that
    // costs 20 ms saves time from 400 tokens on.
    assert!(stays(399) && !stays(401));
    // A hand-over that costs 200 ms saves time only from about 4000 tokens on.
    for _ in 0..64 {
        measured.handed_over(Duration::from_millis(200));
    }
    assert!(stays(3900) && !stays(4100));
    // If a token costs 1 ms, a hand-over that costs 200 ms saves time from about 200 tokens on.
    for _ in 0..64 {
        measured.prefilled(1000, Duration::from_secs(1));
    }
    assert!(stays(190) && !stays(210));
    // Short prompts do not change the measured speed.
    measured.prefilled(1, Duration::from_secs(9));
    assert!(stays(190) && !stays(210));
    // If the cost of a hand-over is no longer measured, its estimate decreases, so that a request tries a
    // hand-over again after a while.
    let tries = (0..10_000).take_while(|_| {
        let stays = stays(100);
        measured.stayed();
        stays
    });
    assert!((100..300).contains(&tries.count()));
}
