use protocol::registration::InstanceRole;

use super::*;
use crate::connectors::Connector;
use crate::fleet::instance::{Named, Source};
use crate::fleet::kv_fit::tests::kv;

fn instance(id: &str, role: InstanceRole, kv: Kv) -> Arc<Instance> {
    let named = Named {
        role,
        url: format!("http://{id}:1"),
        id: Some(id.into()),
        connector: Connector::Nixl,
        host: None,
        init_ports: vec![],
        alloc_ports: vec![],
        zmq: None,
        models: Vec::new(),
    };
    let mut instance = Instance::named(&named, Source::Configured).unwrap();
    instance.connector = Connector::Sidecar;
    instance.standing = Standing::Ready;
    instance.kv = kv;
    Arc::new(instance)
}

#[test]
fn both_of_a_pair_that_cannot_be_name_the_other() {
    let p = instance("p", InstanceRole::Prefill, kv(4));
    let d = instance("d", InstanceRole::Decode, kv(5));
    let e = instance("e", InstanceRole::Decode, kv(4));
    let all = [p, d, e];
    let with = |at: usize| {
        let unfit = unfit(&all[at], &all);
        unfit.iter().map(|u| u.with.clone()).collect::<Vec<_>>()
    };
    assert_eq!(with(0), ["d"]);
    assert_eq!(with(1), ["p"]);
    assert!(with(2).is_empty());
    assert!(unfit(&all[0], &all)[0].why.contains("layers is 4"));
}

#[test]
fn what_stands_in_the_log_is_kept_as_long_as_both_are_there() {
    let p = instance("p", InstanceRole::Prefill, kv(4));
    let d = instance("d", InstanceRole::Decode, kv(5));
    let u = instance(
        "u",
        InstanceRole::Both,
        Kv {
            unmoved: "no".into(),
            ..Kv::default()
        },
    );
    let mut pairs = LoggedPairs::default();
    pairs.log(&[p.clone(), d.clone(), u]);
    let words: Vec<_> = pairs
        .logged
        .iter()
        .map(|(one, other, _)| format!("{one} {other}"))
        .collect();
    assert_eq!(words, ["p d", "u "]);
    // A pair stays noted while one of its instances is not ready, so it is not logged a second time.
    let mut asleep = Arc::unwrap_or_clone(Arc::clone(&d));
    asleep.standing = Standing::NotReady("asleep".into());
    pairs.log(&[p.clone(), Arc::new(asleep)]);
    assert_eq!(pairs.logged.len(), 1);
    pairs.log(&[p]);
    assert!(pairs.logged.is_empty());
}
