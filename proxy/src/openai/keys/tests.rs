use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::connectors::Connector;
use crate::fleet::instance::{Instance, Named, Source};
use http::header::HOST;
use protocol::registration::InstanceRole;

#[test]
fn keys() {
    let access = Access {
        api_key: vec!["one".into(), "two".into()],
        ..Access::default()
    };
    let check = |value: &str, ok: bool| {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        assert_eq!(may_ask(&access, &headers).is_ok(), ok, "{value}");
    };
    check("Bearer one", true);
    check("bearer two", true);
    check("Bearer tw", false);
    check("Bearer ", false);
    check("Basic one", false);
    assert!(may_ask(&access, &HeaderMap::new()).is_err());
    assert!(may_ask(&Access::default(), &HeaderMap::new()).is_ok());
}

#[test]
fn changes() {
    let open = Access::default();
    let from = |text: &str| Some(text.parse().unwrap());
    let mut none = HeaderMap::new();
    none.insert(HOST, "localhost".parse().unwrap());
    assert!(may_change(&open, &none, from("127.0.0.1")).is_ok());
    assert!(may_change(&open, &none, from("::ffff:127.0.0.1")).is_ok());
    assert!(may_change(&open, &none, from("10.0.0.1")).is_err());
    none.insert(HOST, "rebound.example".parse().unwrap());
    assert!(may_change(&open, &none, from("127.0.0.1")).is_err());
    let keyed = Access {
        admin_key: vec!["j".into(), "k".into()],
        ..Access::default()
    };
    assert!(may_change(&keyed, &none, from("127.0.0.1")).is_err());
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, "Bearer k".parse().unwrap());
    assert!(may_change(&keyed, &headers, from("10.0.0.1")).is_ok());
}

/// The pages show ids of requests and addresses of instances. Another host needs a key for them, if there is any key.
#[test]
fn pages() {
    let keys = |api: &[&str], admin: Option<&str>| Access {
        api_key: api.iter().map(|&key| key.to_owned()).collect(),
        admin_key: admin.map(str::to_owned).into_iter().collect(),
        ..Access::default()
    };
    let reads = |access: &Access, key: Option<&str>, from: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, "localhost".parse().unwrap());
        if let Some(key) = key {
            let value = format!("Bearer {key}").parse().unwrap();
            headers.insert(AUTHORIZATION, value);
        }
        may_read(access, &headers, Some(from.parse().unwrap())).is_ok()
    };
    let (here, there) = ("127.0.0.1", "10.0.0.1");
    for (access, key, from, expect) in [
        (keys(&[], None), None, here, true),
        (keys(&[], None), None, there, true),
        (keys(&["c"], None), None, here, true),
        (keys(&["c"], None), None, there, false),
        (keys(&["c"], None), Some("c"), there, true),
        (keys(&["c"], Some("a")), Some("c"), there, false),
        (keys(&["c"], Some("a")), Some("a"), there, true),
        (keys(&[], Some("a")), None, here, false),
        (keys(&[], Some("a")), Some("a"), here, true),
    ] {
        assert_eq!(
            reads(&access, key, from),
            expect,
            "{access:?} {key:?} {from}"
        );
    }
}

#[test]
fn hosts() {
    let allow = ["10.0.0.0/8", "engine", "*.gpu.example", "192.0.2.7"];
    let access = Access {
        allow: allow.map(str::to_owned).to_vec(),
        ..Access::default()
    };
    let check = |url: &str, ok: bool| {
        let named = Named {
            role: InstanceRole::Prefill,
            url: url.into(),
            id: None,
            connector: Connector::Nixl,
            host: None,
            init_ports: Vec::new(),
            alloc_ports: Vec::new(),
            zmq: None,
            models: Vec::new(),
        };
        let instance = Instance::named(&named, Source::Added).unwrap();
        assert_eq!(access.check(instance.hosts()).is_ok(), ok, "{url}");
    };
    check("http://10.1.2.3:80", true);
    check("http://11.1.2.3", false);
    check("http://ENGINE:1", true);
    check("http://a.gpu.example", true);
    check("http://.gpu.example.org", false);
    check("http://192.0.2.7", true);
    check("http://192.0.2.8", false);
    check("http://[::1]:1", false);
    let bad = Access {
        allow: ["10.0.0.0/99", "a b", "", "h:80"]
            .map(str::to_owned)
            .to_vec(),
        api_key: vec![String::new()],
        ..Access::default()
    };
    assert_eq!(bad.problems().len(), 5);
}

/// A file that cannot be used stops the start. While the proxy runs, such a file changes nothing.
#[test]
fn key_files_with_mistakes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("api");
    let write = |text: &str, mode: u32| {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
    };
    let files = KeyFiles {
        api_key_file: Some(file.clone()),
        ..KeyFiles::default()
    };
    let access = Access {
        files: files.clone(),
        ..Access::default()
    };
    let mistakes = [
        ("", 0o600, "no key in it; write one key per line"),
        ("# none\n", 0o600, "no key in it"),
        (
            "one\ntwo words\n",
            0o600,
            "key 2: a key must be printable ASCII without spaces",
        ),
        ("one\n", 0o644, "chmod 600 the file"),
    ];
    for (text, mode, expected) in mistakes {
        write(text, mode);
        let problems = access.problems();
        let begin = format!("--api-key-file {}: ", file.display());
        assert!(
            problems.len() == 1 && problems[0].starts_with(&begin),
            "{problems:?}"
        );
        assert!(problems[0].contains(expected), "{problems:?}");
        assert!(!problems[0].contains("two words"), "{problems:?}");
        files.load().unwrap_err();
    }
    write("one\n", 0o600);
    files.load().unwrap();
    let asks = |key: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Bearer {key}").parse().unwrap());
        may_ask(&access, &headers).is_ok()
    };
    for (text, mode, _) in mistakes {
        write(text, mode);
        files.reread();
        assert!(asks("one") && !asks("two"), "{text:?}");
    }
    std::fs::remove_file(&file).unwrap();
    files.reread();
    assert!(asks("one"), "a file that vanishes opens and locks nothing");
    write("two\n", 0o600);
    files.reread();
    assert!(asks("two") && !asks("one"));

    let two = KeyFiles {
        engine_key_file: Some(file.clone()),
        ..KeyFiles::default()
    };
    write("one\ntwo\n", 0o600);
    assert!(two.problems()[0].contains("--engine-key-file: 2 keys"));
}
