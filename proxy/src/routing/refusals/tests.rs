use protocol::registration::InstanceRole;

use super::*;
use crate::connectors::Connector;
use crate::fleet::instance::{Named, Source};

fn instance(id: &str, role: InstanceRole) -> Instance {
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
    Instance::named(&named, Source::Configured).unwrap()
}

struct World {
    refusals: Refusals,
    now: Instant,
    p: Instance,
    d: Instance,
    requests: u32,
}

impl World {
    fn new() -> Self {
        Self {
            refusals: Refusals::default(),
            now: Instant::now(),
            p: instance("p", InstanceRole::Prefill),
            d: instance("d", InstanceRole::Decode),
            requests: 0,
        }
    }

    fn note(&mut self, reason: &str, body: &str) {
        self.requests += 1;
        let refused = Refused {
            request: &self.requests.to_string(),
            prefill: &self.p,
            decode: &self.d,
            body: &parsed(body),
            endpoint: endpoint(body),
        };
        self.refusals.note(self.now, reason, refused);
    }

    fn worked(&self, body: &str) {
        let endpoint = endpoint(body);
        self.refusals
            .worked(&self.p, &self.d, &parsed(body), endpoint);
    }

    fn refuses(&self, body: &str) -> bool {
        let known = self.refusals.of(self.now, &parsed(body), endpoint(body));
        known.iter().any(|b| b.holds_for(&self.p, &self.d))
    }
}

fn parsed(body: &str) -> RequestBody {
    RequestBody::parse(body.to_owned().into()).unwrap()
}

fn endpoint(body: &str) -> Endpoint {
    if body.contains("messages") {
        Endpoint::Chat
    } else {
        Endpoint::Completions
    }
}

const CHAT: &str = r#"{"model": "m", "messages": [{"content": "a"}]}"#;
const IMAGE: &str = r#"{"model": "m", "messages": [{"content": [{"type": "image_url"}]}]}"#;
const BASE: &str = r#"{"model": "m", "prompt": "a"}"#;
const LORA: &str = r#"{"model": "adapter", "prompt": "a"}"#;
const ODD: &str = r#"{"model": "m", "prompt": "a", "vllm_xargs": {"x": 1}}"#;

#[test]
fn a_model_name_is_learned_and_tried_again_after_a_while() {
    let mut world = World::new();
    world.note("lora", LORA);
    assert!(world.refuses(LORA) && !world.refuses(BASE));
    let shown = world.refusals.by(world.now, &world.p);
    assert_eq!(
        (shown[0].requests.as_str(), shown[0].reason.as_str()),
        ("model \"adapter\"", "lora")
    );
    world.now += LONG;
    assert!(!world.refuses(LORA));
    assert!(world.refusals.by(world.now, &world.p).is_empty());
}

#[test]
fn a_kind_of_request_is_learned_by_its_fields() {
    let mut world = World::new();
    world.note("prompt_logprobs", ODD);
    assert!(world.refuses(ODD) && !world.refuses(BASE) && !world.refuses(LORA));
    assert!(world.refuses(r#"{"vllm_xargs": {"x": 2}, "prompt": "b", "model": "n"}"#));
}

#[test]
fn a_pair_is_learned_and_another_epoch_is_another_instance() {
    let mut world = World::new();
    world.note("layout_mismatch", BASE);
    assert!(world.refuses(BASE) && world.refuses(LORA));
    world.d.id = "e".into();
    assert!(!world.refuses(BASE), "another decode instance");
    world.d.id = "d".into();
    world.d.epoch = 8;
    assert!(!world.refuses(BASE), "it was started anew");
    world.d.epoch = 0;
    world.refusals.forget("d");
    assert!(!world.refuses(BASE), "it was away");
}

#[test]
fn what_may_pass_by_itself_counts_in_a_row_only() {
    let mut world = World::new();
    world.note("no_link", BASE);
    world.note("no_link", BASE);
    world.worked(BASE);
    world.note("no_link", BASE);
    world.note("no_link", BASE);
    // One request is reported twice and counts once.
    world.requests -= 1;
    world.note("no_link", BASE);
    assert!(!world.refuses(BASE));
    world.note("no_link", BASE);
    assert!(world.refuses(BASE));
    world.now += BRIEFLY;
    assert!(!world.refuses(BASE));
}

/// A template that contains the time renders one prompt in two ways. The refusal of this prompt does not
/// concern other prompts.
#[test]
fn keys_of_one_prompt_condemn_no_pair() {
    let mut world = World::new();
    for _ in 0..10 {
        world.note("key_mismatch", BASE);
        assert!(!world.refuses(BASE));
        world.worked(BASE);
    }
    for _ in 0..3 {
        assert!(!world.refuses(BASE));
        world.note("key_mismatch", BASE);
    }
    assert!(world.refuses(BASE), "three in a row");
    world.now += LONG;
    assert!(!world.refuses(BASE));
}

/// KV of an adapter whose weights differ on the two sides is never handed over. KV of the base model and
/// of its other adapters is still handed over.
#[test]
fn keys_of_one_adapter_condemn_no_other_model() {
    let mut world = World::new();
    for _ in 0..3 {
        assert!(!world.refuses(LORA));
        world.note("key_mismatch", LORA);
        world.worked(BASE);
    }
    assert!(world.refuses(LORA) && !world.refuses(BASE));
    world.d.id = "e".into();
    assert!(
        !world.refuses(LORA),
        "another decode instance may have the same weights"
    );
    world.d.id = "d".into();
    world.worked(LORA);
    assert!(!world.refuses(LORA));
}

/// Keys of images depend on more settings than keys of text. If they never match, KV of text is still handed
/// over.
#[test]
fn keys_of_images_condemn_no_text() {
    let mut world = World::new();
    for _ in 0..3 {
        assert!(!world.refuses(IMAGE));
        world.note("key_mismatch", IMAGE);
        world.worked(CHAT);
    }
    assert!(world.refuses(IMAGE) && !world.refuses(CHAT));
    world.worked(IMAGE);
    assert!(!world.refuses(IMAGE));
}

#[test]
fn what_says_nothing_of_the_next_request_is_not_learned_and_the_rest_is_bounded() {
    let mut world = World::new();
    for reason in [
        "no_room",
        "duplicate",
        "bad_params",
        "cancelled",
        "nothing_to_load",
        "?",
    ] {
        world.note(reason, BASE);
    }
    assert_eq!(world.refusals.count.load(Ordering::Relaxed), 0);
    for n in 0..2 * MAX_ENTRIES {
        world.note("lora", &format!(r#"{{"model": "a{n}", "prompt": "a"}}"#));
    }
    assert_eq!(world.refusals.count.load(Ordering::Relaxed), MAX_ENTRIES);
    let long = format!(
        r#"{{"model": "{}", "prompt": "a"}}"#,
        "x".repeat(MAX_TEXT_BYTES)
    );
    world.note("lora", &long);
    assert!(!world.refuses(&long));
}
