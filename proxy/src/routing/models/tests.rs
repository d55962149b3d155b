use super::*;
use crate::connectors::Connector;
use crate::fleet::instance::{Named, Source};
use protocol::registration::InstanceRole;

const USUAL: Rules = Rules {
    mode: Mode::Pd,
    prefill: Policy::RoundRobin,
    decode: Policy::RoundRobin,
};

fn instance(id: &str, models: &[String]) -> Arc<Instance> {
    let named = Named {
        role: InstanceRole::Decode,
        url: format!("http://{id}:1"),
        id: None,
        connector: Connector::Nixl,
        host: None,
        init_ports: Vec::new(),
        alloc_ports: Vec::new(),
        zmq: None,
        models: models.to_vec(),
    };
    Arc::new(Instance::named(&named, Source::Configured).unwrap())
}

fn served(names: &[&str]) -> Arc<Instance> {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    instance(&names[0], &names)
}

#[test]
fn each_model_has_its_own_state() {
    let special = Rules {
        mode: Mode::Ppd,
        decode: Policy::Prefix,
        ..USUAL
    };
    let models = Models::new(USUAL, [("b".to_owned(), special)].into());
    assert_eq!(&*models.of(Some("a")).name, UNKNOWN);
    models.adopt(&[served(&["a", "a-lora"]), served(&["b"])]);
    let name = |model| models.of(model).name.clone();
    assert_eq!(
        &*name(Some("a-lora")),
        "a",
        "an adapter shares its model's state"
    );
    assert_eq!(&*name(None), "a", "the first decode instance's model");
    assert_eq!(&*name(Some("c")), UNKNOWN);
    let b = models.of(Some("b"));
    assert_eq!((b.mode.get(), b.policies()[1]), (Mode::Ppd, Policy::Prefix));
    assert_eq!(models.of(Some("a")).mode.get(), Mode::Pd);
    b.counts.arrived();
    models.adopt(&[served(&["a", "a-lora", "a-new"]), served(&["b"])]);
    assert_eq!(&*name(Some("a-new")), "a");
    assert!(Arc::ptr_eq(&b, &models.of(Some("b"))), "the counts stay");
    models.adopt(&[served(&["b"])]);
    assert_eq!(&*name(None), "b");
    models.set_mode(Mode::Auto);
    assert_eq!(models.of(Some("b")).mode.get(), Mode::Auto);
}

#[test]
fn the_number_of_states_is_bounded() {
    let models = Models::new(USUAL, BTreeMap::new());
    let names = |range: std::ops::Range<usize>| -> Vec<_> {
        range.map(|n| served(&[&format!("m{n}")])).collect()
    };
    models.adopt(&names(0..MAX_MODELS + 5));
    assert_eq!(models.served().len(), MAX_MODELS);
    assert_eq!(models.all().len(), MAX_MODELS + 1);
    assert_eq!(
        &*models.of(Some(&format!("m{}", MAX_MODELS + 1))).name,
        UNKNOWN
    );
    // Models that no instance serves make room.
    models.adopt(&names(1000..1010));
    assert_eq!(models.served().len(), 10);
}
