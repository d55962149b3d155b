use super::*;
use crate::instance::{BaseUrl, Standing};
use protocol::registration::InstanceRole;

/// `p1`: prefill, `d1`: decode, `b1`: both; with `-` in front: not ready.
fn instance(word: &str) -> Arc<Instance> {
    let id = word.trim_start_matches('-');
    let role = match &id[..1] {
        "p" => InstanceRole::Prefill,
        "d" => InstanceRole::Decode,
        _ => InstanceRole::Both,
    };
    Arc::new(Instance {
        id: id.into(),
        epoch: 1,
        role,
        http: BaseUrl::parse("http", "http://127.0.0.1:1").unwrap(),
        admin: BaseUrl::parse("admin", "http://127.0.0.1:2").unwrap(),
        host: "127.0.0.1".into(),
        init_ports: vec![7300],
        alloc_ports: vec![7400],
        slots: 1,
        free_slots: 1,
        parked_tokens: 0,
        standing: match word.starts_with('-') {
            true => Standing::NotReady("asleep".into()),
            false => Standing::Ready,
        },
    })
}

fn routed(
    there: &str,
    turn: usize,
    alone: Option<Alone>,
    failed: &[&str],
) -> Result<String, NoRoute> {
    let instances: Vec<_> = there.split_whitespace().map(instance).collect();
    let failed: Vec<_> = failed.iter().map(|id| (*id).to_owned()).collect();
    let ask = Ask {
        alone,
        policy: Policy::RoundRobin {
            prefill_turn: turn,
            decode_turn: turn,
        },
        failed: &failed,
    };
    let pair = route(&instances, &ask)?;
    let prefill = pair
        .prefill
        .map_or_else(|why| why.to_string(), |p| p.id.clone());
    Ok(format!("{prefill} {}", pair.decode.id))
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
    for why in Alone::ALL {
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
        let got = routed(there, turn, Some(Alone::DecodeRetry), failed);
        assert_eq!(got.as_deref(), Ok(expect), "{there} but {failed:?}");
    };
    check("p1 d1 d2", 0, &["d1"], "decode_retry d2");
    check("p1 d1 d2", 1, &["d1"], "decode_retry d2");
    check("p1 d1 d2 d3", 1, &["d1", "d3"], "decode_retry d2");
}
