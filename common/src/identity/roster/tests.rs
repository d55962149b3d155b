use super::*;

const A: &str = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const B: &str = "ed25519:AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const C: &str = "ed25519:AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn mistakes(text: &str) -> String {
    Roster::parse(text).unwrap_err().join("\n")
}

#[test]
fn a_roster_names_each_key() {
    let text = format!(
        "{A}: {{name: prefill-a, roles: [sender], hosts: [10.0.0.1, '[fe80::1]', Prefill.example]}}\n\
         {B}:\n  name: both\n  roles: [receiver, sender]\n"
    );
    let roster = Roster::parse(&text).unwrap();
    let member = roster.member(&A.parse().unwrap()).unwrap();
    assert_eq!(&*member.name, "prefill-a");
    assert!(member.has(&[Role::Sender, Role::Proxy]) && !member.has(&[Role::Receiver]));
    for (host, there) in [
        ("10.0.0.1", true),
        ("fe80::1", true),
        ("[fe80::1]", true),
        ("prefill.example", true),
        ("10.0.0.2", false),
        ("10.0.0.1.evil", false),
    ] {
        assert_eq!(member.is_at(host), there, "{host}");
    }
    let both = roster.named("both").unwrap();
    assert_eq!(both.roles, [Role::Sender, Role::Receiver]);
    assert!(both.is_at("anywhere"));
    assert_eq!(roster.keys_of("both"), [B.parse().unwrap()]);
    assert!(roster.member(&C.parse().unwrap()).is_none());
    assert!(Roster::parse("# nobody yet\n").unwrap().is_empty());
}

#[test]
fn every_mistake_names_field_and_cure() {
    for (text, expected) in [
        ("- a\n", "not a list of keys: "),
        ("a: [\n", "not a list of keys: "),
        (
            "{K}: 5\n",
            "{K}: entry: not a map; write ed25519:KEY: {name: NAME",
        ),
        (
            "ssh-ed25519: {name: a, roles: [sender]}\n",
            "not a public key: write ed25519: and the 43",
        ),
        (
            "ed25519:AAAA: {name: a, roles: [sender]}\n",
            "not a public key",
        ),
        (
            "{K}: {roles: [sender]}\n",
            "{K}: name: write 1 to 128 letters",
        ),
        ("{K}: {name: 7, roles: [sender]}\n", "{K}: name: write"),
        ("{K}: {name: 'a b', roles: [sender]}\n", "{K}: name: write"),
        (
            "{K}: {name: a}\n",
            "{K}: roles: write a list of sender, receiver and proxy",
        ),
        (
            "{K}: {name: a, roles: sender}\n",
            "{K}: roles: write a list",
        ),
        ("{K}: {name: a, roles: []}\n", "{K}: roles: write a list"),
        (
            "{K}: {name: a, roles: [Sender]}\n",
            "{K}: roles: \"Sender\" is no role; write sender,",
        ),
        (
            "{K}: {name: a, roles: [proxy, proxy]}\n",
            "{K}: roles: proxy stands twice; remove one",
        ),
        (
            "{K}: {name: a, roles: [proxy], hosts: ['h:7300']}\n",
            "{K}: hosts: \"h:7300\" is no host; write an IP",
        ),
        (
            "{K}: {name: a, roles: [proxy], hosts: []}\n",
            "{K}: hosts: write a list of IP addresses",
        ),
        (
            "{K}: {name: a, roles: [proxy], host: [h]}\n",
            "{K}: host: unknown; write name, roles, hosts and replicas",
        ),
        (
            "{K}: {name: a, roles: [proxy]}\n{K}: {name: b, roles: [proxy]}\n",
            "not a list of keys: ",
        ),
    ] {
        let said = mistakes(&text.replace("{K}", A));
        let expected = expected.replace("{K}", A);
        assert!(said.contains(&expected), "{text}\n{said}\n{expected}");
    }
}

#[test]
fn all_mistakes_are_named_at_once() {
    let said = mistakes(&format!(
        "{A}: {{name: '', roles: [king], hosts: ['?']}}\n{B}: {{}}\n"
    ));
    assert_eq!(said.lines().count(), 5, "{said}");
}

#[test]
fn a_name_has_at_most_two_keys_with_the_same_rights() {
    let same = format!("{A}: {{name: a, roles: [sender]}}\n{B}: {{name: a, roles: [sender]}}\n");
    assert_eq!(Roster::parse(&same).unwrap().keys_of("a").len(), 2);
    let more = format!("{same}{C}: {{name: a, roles: [sender]}}\n");
    assert!(
        mistakes(&more).contains("a: name: 3 keys have it"),
        "{more}"
    );
    let other = format!("{A}: {{name: a, roles: [sender]}}\n{B}: {{name: a, roles: [proxy]}}\n");
    assert!(mistakes(&other).contains("a: its keys have different roles, hosts or replicas"));
}

#[test]
fn replicas_have_names_of_their_own() {
    let text = format!(
        "{A}: {{name: web, roles: [sender], replicas: true}}\n{B}: {{name: one, roles: [sender]}}\n"
    );
    let roster = Roster::parse(&text).unwrap();
    let (web, one) = (roster.named("web").unwrap(), roster.named("one").unwrap());
    for (id, of_web, of_one) in [
        ("web", true, false),
        ("web-1", true, false),
        ("web-", false, false),
        ("web1", false, false),
        ("", false, false),
        ("one", false, true),
        ("one-1", false, false),
        ("web-1/0", false, false),
    ] {
        assert_eq!(
            (web.is_called(id), one.is_called(id)),
            (of_web, of_one),
            "{id}"
        );
    }
    for (id, of_web, of_one) in [
        ("web-1/0", true, false),
        ("web-1", true, false),
        ("one/7", false, true),
        ("one1/7", false, false),
        ("/7", false, false),
    ] {
        assert_eq!(
            (web.has_rank(id), one.has_rank(id)),
            (of_web, of_one),
            "{id}"
        );
    }
    // A process with the name web-1 and a key of its own could not be told from a replica.
    let found = mistakes(&format!("{text}{C}: {{name: web-1, roles: [sender]}}\n"));
    assert!(
        found.contains("web: replicas: they may have the name web-1"),
        "{found}"
    );
    let found = mistakes(&format!(
        "{A}: {{name: web, roles: [sender], replicas: 2}}\n"
    ));
    assert!(
        found.contains("replicas: write true if several processes use the key"),
        "{found}"
    );
}
