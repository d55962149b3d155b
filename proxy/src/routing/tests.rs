use super::*;
use crate::connectors::Connector;
use crate::fleet::base_url::BaseUrl;
use crate::fleet::instance::{Named, Source, Standing};
use crate::fleet::kv_fit::Kv;
use protocol::registration::InstanceRole;

/// Returns the instance and the load that a word describes: `p1` takes prefill legs, `d1` takes decode legs,
/// `b1` takes both. The prefix `-` means not ready, `~` means draining, `!` means failing. A suffix `/tokens`
/// gives the tokens in flight. A suffix `=a+b` gives the names of the models. The connector is `NixlConnector`; with the suffix `:l` it is LMCache; with the
/// suffix `:s` the instance has a sidecar.
fn instance(word: &str) -> (Arc<Instance>, LoadSnapshot) {
    let (word, models) = word.split_once('=').unwrap_or((word, ""));
    let (word, connector) = match word.split_once(':') {
        Some((word, "l")) => (word, Connector::Lmcache),
        Some((word, _)) => (word, Connector::Sidecar),
        None => (word, Connector::Nixl),
    };
    let (word, tokens) = word.split_once('/').unwrap_or((word, "0"));
    let id = word.trim_start_matches(['-', '~', '!']);
    let role = match &id[..1] {
        "p" => InstanceRole::Prefill,
        "d" => InstanceRole::Decode,
        _ => InstanceRole::Both,
    };
    let named = Named {
        role,
        url: format!("http://{id}:1"),
        id: Some(id.into()),
        connector: Connector::Nixl,
        host: None,
        init_ports: vec![7300],
        alloc_ports: vec![7400],
        zmq: None,
        models: models.split('+').map(str::to_owned).collect(),
    };
    let mut instance = Instance::named(&named, Source::Configured).unwrap();
    assert_eq!(instance.http, BaseUrl::parse("url", &named.url).unwrap());
    instance.connector = connector;
    instance.standing = match word.starts_with('-') {
        true => Standing::NotReady("asleep".into()),
        false => Standing::Ready,
    };
    instance.draining = word.starts_with('~');
    let loads = LoadSnapshot {
        tokens: tokens.parse().unwrap(),
        legs: 0,
        is_open: word.starts_with('!'),
    };
    (Arc::new(instance), loads)
}

fn ask() -> RouteRequest<'static> {
    RouteRequest {
        model: None,
        fallback: None,
        is_unsplittable: false,
        is_salted: false,
        sidecars_only: None,
        is_other_endpoint: false,
        prefill: SideChoice::default(),
        decode: SideChoice::default(),
        mode: Mode::Pd,
        costs: Costs {
            prefill_us_per_token: 10.0,
            hand_over_us: 5000.0,
        },
        session: None,
        prompt_tokens: 1000,
        held: &[],
        conversation: None,
        failed: &[],
        refused: &[],
    }
}

fn chosen(there: &str, ask: &RouteRequest<'_>) -> Result<String, NoRoute> {
    let (instances, loads): (Vec<_>, Vec<_>) = there.split_whitespace().map(instance).unzip();
    let pair = route(&instances, &loads, ask)?;
    let prefill = pair
        .prefill
        .map_or_else(|why| why.to_string(), |p| p.id.clone());
    Ok(format!("{prefill} {}", pair.decode.id))
}

fn routed(
    there: &str,
    turn: usize,
    fallback: Option<Fallback>,
    failed: &[&str],
) -> Result<String, NoRoute> {
    let failed: Vec<_> = failed.iter().map(|id| (*id).to_owned()).collect();
    let side = SideChoice {
        policy: Policy::RoundRobin,
        turn,
    };
    let ask = RouteRequest {
        fallback,
        prefill: side,
        decode: side,
        failed: &failed,
        ..ask()
    };
    chosen(there, &ask)
}

fn check(there: &str, ask: &RouteRequest<'_>, expect: &str) {
    assert_eq!(chosen(there, ask).as_deref(), Ok(expect), "{there} {ask:?}");
}

#[test]
fn only_equal_connectors_make_pairs() {
    check("p1 d1:l", &ask(), "no_prefill d1");
    check("p1 p2:l d1:l", &ask(), "p2 d1");
    // Routing prefers a decode instance to which a prefill instance can hand KV over, even when it is another
    // decode instance's turn.
    check("d1:l p1 d2", &ask(), "p1 d2");
    let unsplittable = RouteRequest {
        is_unsplittable: true,
        ..ask()
    };
    check("p1:l d1:l", &unsplittable, "not_expressible d1");
    check("p1 d1", &unsplittable, "p1 d1");
    let salted = RouteRequest {
        is_salted: true,
        ..ask()
    };
    check("p1:l d1:l", &salted, "cache_salt d1");
    check("p1 d1:l p2:l d2", &salted, "p1 d2");
    let many = RouteRequest {
        sidecars_only: Some(Fallback::ManySequences),
        ..ask()
    };
    check("p1 d1", &many, "many_sequences d1");
    check("p1 d1 p2:s d2:s", &many, "p2 d2");
    check("p1:l d1:s", &many, "many_sequences d1");
}

#[test]
fn who_drains_or_fails_is_left_alone() {
    check("p1 ~p2 ~d1 d2", &ask(), "p1 d2");
    check("!p1 p2 !d1 d2", &ask(), "p2 d2");
    check("!p1 d1", &ask(), "no_prefill d1");
    check("p1 !d1", &ask(), "p1 d1");
    assert_eq!(chosen("p1 ~d1", &ask()), Err(NoRoute::NoneReady(1)));
}

#[test]
fn policies() {
    let by = |policy| RouteRequest {
        prefill: SideChoice { policy, turn: 0 },
        decode: SideChoice { policy, turn: 0 },
        ..ask()
    };
    let least = by(Policy::LeastTokens);
    check("p1/500 p2/20 d1/7 d2/6", &least, "p2 d2");
    check("p1 p2 d1 d2", &least, "p1 d1");
    let held = [("p1".to_owned(), 900), ("d2".to_owned(), 512)];
    let prefix = RouteRequest {
        held: &held,
        ..by(Policy::Prefix)
    };
    check("p1/500 p2/20 d1/7 d2/6", &prefix, "p1 d2");
    // The tokens that are queued before the request cost more time than the held prefix saves.
    check("p1/921 p2/20 d1/7 d2/600", &prefix, "p2 d1");
    let session = |key| RouteRequest {
        session: Some(key),
        ..by(Policy::Session)
    };
    let there = "p1/9 p2 d1/9 d2 d3";
    let places: Vec<_> = (0..64)
        .map(|key| chosen(there, &session(key)).unwrap())
        .collect();
    for (key, place) in (0..).zip(&places) {
        assert_eq!(chosen(there, &session(key)).as_ref(), Ok(place));
        // If `d3` disappears, the sessions of `d2` stay.
        if place.ends_with("d2") {
            assert!(
                chosen("p1 p2 d1 d2", &session(key))
                    .unwrap()
                    .ends_with("d2")
            );
        }
    }
    for decode in ["d1", "d2", "d3"] {
        let count = places
            .iter()
            .filter(|place| place.ends_with(decode))
            .count();
        assert!((8..40).contains(&count), "{decode}: {count} of 64");
    }
    check("p1/9 p2 d1/9 d2", &by(Policy::Session), "p2 d2");
}

#[test]
fn modes() {
    let mode = |mode, conversation| RouteRequest {
        mode,
        conversation,
        ..ask()
    };
    check("p1 d1 d2", &mode(Mode::Ppd, None), "p1 d1");
    check("p1 d1 d2", &mode(Mode::Ppd, Some("d2")), "later_turn d2");
    check("p1 d1 ~d2", &mode(Mode::Ppd, Some("d2")), "p1 d1");
    check("p1 d1 d2", &mode(Mode::Pd, Some("d2")), "p1 d1");
    // 1000 tokens cost 10 ms at both instances, and the hand-over costs another 5 ms, so the decode
    // instance computes the prompt. If the prefill instance has a queue, the decode instance also
    // computes the prompt.
    check("p1 d1", &mode(Mode::Auto, None), "cheaper d1");
    check("p1/5000 d1", &mode(Mode::Auto, None), "cheaper d1");
    let held = |held| RouteRequest {
        held,
        ..mode(Mode::Auto, None)
    };
    let prefill = [("p1".to_owned(), 900)];
    check("p1 d1", &held(&prefill), "p1 d1");
    let both = [("p1".to_owned(), 900), ("d1".to_owned(), 800)];
    check("p1 d1", &held(&both), "cheaper d1");
}

#[test]
fn pairs() {
    let check = |there: &str, turn: usize, expect: &str| {
        assert_eq!(
            routed(there, turn, None, &[]).as_deref(),
            Ok(expect),
            "{there}, turn {turn}"
        );
    };
    check("p1 d1", 0, "p1 d1");
    check("p1 d1", usize::MAX, "p1 d1");
    check("p1 p2 d1", 1, "p2 d1");
    check("p1 p2 d1 d2 d3", 2, "p1 d3");
    check("-p1 p2 d1", 0, "p2 d1");
    check("p1 -d1 d2", 0, "p1 d2");
    check("-p1 d1", 0, "no_prefill d1");
    check("d1", 7, "no_prefill d1");
    check("b1", 0, "no_prefill b1");
    check("b1 b2", 0, "b2 b1");
    check("b1 b2", 1, "b1 b2");
    check("p1 b1", 0, "p1 b1");
    check("p1 b1", 1, "p1 b1");
}

#[test]
fn alone() {
    for why in Fallback::ALL {
        let expect = format!("{why} d1");
        assert_eq!(routed("p1 d1", 0, Some(why), &[]), Ok(expect));
    }
}

#[test]
fn nobody() {
    let check = |there: &str, failed: &[&str], expect: NoRoute| {
        assert_eq!(
            routed(there, 0, None, failed),
            Err(expect),
            "{there} but {failed:?}"
        );
    };
    check("", &[], NoRoute::NoDecode);
    check("p1", &[], NoRoute::NoDecode);
    check("p1 -d1 -b1", &[], NoRoute::NoneReady(2));
    check("p1 d1", &["d1"], NoRoute::AllFailed);
    check("p1 d1 -d2", &["d1"], NoRoute::AllFailed);
}

#[test]
fn another_one() {
    let check = |there: &str, turn: usize, failed: &[&str], expect: &str| {
        let got = routed(there, turn, Some(Fallback::DecodeRetry), failed);
        assert_eq!(got.as_deref(), Ok(expect), "{there} but {failed:?}");
    };
    check("p1 d1 d2", 0, &["d1"], "decode_retry d2");
    check("p1 d1 d2", 1, &["d1"], "decode_retry d2");
    check("p1 d1 d2 d3", 1, &["d1", "d3"], "decode_retry d2");
}

/// Routes a request to a pair of sidecars with these KV descriptions. Returns the prefill instance, or
/// the fallback.
fn of_kv(prefill: Kv, decode: Kv, refused: &[Between]) -> String {
    let one = |word: &str, kv: Kv| {
        let (instance, loads) = instance(word);
        let mut instance = Arc::unwrap_or_clone(instance);
        (instance.connector, instance.kv) = (Connector::Sidecar, kv);
        (Arc::new(instance), loads)
    };
    let (instances, loads): (Vec<_>, Vec<_>) =
        [one("p1", prefill), one("d1", decode)].into_iter().unzip();
    let ask = RouteRequest { refused, ..ask() };
    let pair = route(&instances, &loads, &ask).unwrap();
    assert_eq!(pair.decode.id, "d1");
    pair.prefill
        .map_or_else(|why| why.to_string(), |prefill| prefill.id.clone())
}

#[test]
fn what_cannot_be_moved_gets_no_prefill_leg() {
    let silent = Kv::default;
    assert_eq!(of_kv(silent(), silent(), &[]), "p1");
    let unmoved = || Kv {
        unmoved: "heads of two sizes".into(),
        ..Kv::default()
    };
    assert_eq!(of_kv(unmoved(), silent(), &[]), "unfit");
    assert_eq!(of_kv(silent(), unmoved(), &[]), "unfit");
    let ranks = |ranks| Kv {
        ranks,
        ..Kv::default()
    };
    assert_eq!(of_kv(ranks(1), ranks(2), &[]), "unfit");
    assert_eq!(of_kv(ranks(2), ranks(2), &[]), "p1");
}

#[test]
fn only_instances_of_the_same_model_make_pairs() {
    let of = |model| RouteRequest { model, ..ask() };
    let fleet = "p1=a p2=b d1=a d2=b";
    check(fleet, &of(Some("a")), "p1 d1");
    check(fleet, &of(Some("b")), "p2 d2");
    // One vLLM gives its own model to a request without a model, and answers an unknown name itself.
    check(fleet, &of(None), "p1 d1");
    check(fleet, &of(Some("c")), "p1 d1");
    check("p1=a d1=a -d2=b", &of(None), "p1 d1");
    assert_eq!(
        chosen("p1=a p2=b d1=a -d2=b", &of(Some("b"))),
        Err(NoRoute::NoneReady(1)),
        "another model must not answer"
    );
    check("p1=a d2=b", &of(Some("b")), "no_prefill d2");
    // Adapters: only the instances that have loaded it.
    check("p1=a p2=a+x d1=a d2=a+x", &of(Some("x")), "p2 d2");
    check("p1=a d1=a d2=a+x", &of(Some("x")), "no_prefill d2");
    check("p1=a d1=a+x d2=a", &of(Some("a")), "p1 d1");
    // Instances that give no names.
    check("p1 d1", &of(Some("a")), "p1 d1");
    check("p1 d1=a", &of(Some("a")), "p1 d1");
    check("p1 d1 d2=a", &of(Some("a")), "p1 d2");
    check("p1=a d1 d2=b", &of(Some("a")), "p1 d1");
    check("p1=b d1 d2=b", &of(Some("a")), "no_prefill d1");
}

/// Tries every small fleet of two models, an adapter and instances without names.
#[test]
fn no_request_reaches_an_instance_of_another_model() {
    let names = ["", "=a", "=b", "=a+x", "=b+x"];
    let mut fleets = 0;
    for code in 0..names.len().pow(4) {
        let word = |place: u32| names[code / names.len().pow(place) % names.len()];
        let fleet = format!("p1{} b1{} d1{} d2{}", word(0), word(1), word(2), word(3));
        let (instances, loads): (Vec<_>, Vec<_>) = fleet.split_whitespace().map(instance).unzip();
        fleets += 1;
        for (model, turn) in [None, Some("a"), Some("b"), Some("x"), Some("y")]
            .into_iter()
            .flat_map(|model| [(model, 0), (model, 1), (model, 2)])
        {
            let side = SideChoice {
                policy: Policy::RoundRobin,
                turn,
            };
            let ask = RouteRequest {
                model,
                prefill: side,
                decode: side,
                ..ask()
            };
            let pair = route(&instances, &loads, &ask).unwrap();
            let serves = |i: &Instance, name: &str| !i.models.is_known() || i.models.serves(name);
            let is_served = |name: &&str| {
                instances
                    .iter()
                    .any(|i| i.decodes() && i.models.serves(name))
            };
            if let Some(name) = model.filter(is_served) {
                assert!(pair.decode.models.serves(name), "{fleet} {model:?}");
                let may = pair.prefill.as_ref().is_ok_and(|p| serves(p, name));
                assert!(may || pair.prefill.is_err(), "{fleet} {model:?}");
            }
            // A pair with known names has a name in common.
            if let Ok(prefill) = &pair.prefill
                && prefill.models.is_known()
                && pair.decode.models.is_known()
            {
                let common = prefill
                    .models
                    .names()
                    .any(|name| pair.decode.models.serves(name));
                assert!(common, "{fleet} {model:?}");
            }
            assert_eq!(
                route(&instances, &loads, &ask).unwrap().decode.id,
                pair.decode.id,
                "the choice depends on nothing else"
            );
        }
    }
    assert_eq!(fleets, 625);
}
