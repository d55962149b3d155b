//! Key files, and the reaction to a key or a roster that changes.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use common::identity::{Auth, Identity, PrivateKey, PublicKey, Role, keygen};
use protocol::registration::Peer;

use crate::support::{run, within};

fn refused(path: &Path) -> String {
    let error = PrivateKey::read(path).unwrap_err().to_string();
    let begin = format!("{}: ", path.display());
    assert!(error.starts_with(&begin), "{error}");
    error
}

#[test]
fn keygen_writes_a_key_that_only_its_owner_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let public = keygen(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(PrivateKey::read(&path).unwrap().public(), public);
    assert_eq!(public.to_string().parse(), Ok(public));

    // A second call replaces nothing, and follows no link to a place that another user has chosen.
    let before = std::fs::read(&path).unwrap();
    let error = keygen(&path).unwrap_err().to_string();
    assert!(
        error.contains("the file exists; keygen replaces no key"),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let (link, elsewhere) = (folder.path().join("link"), folder.path().join("elsewhere"));
    symlink(&elsewhere, &link).unwrap();
    keygen(&link).unwrap_err();
    assert!(!elsewhere.exists());
}

#[test]
fn a_key_file_that_others_can_reach_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    assert!(refused(&path).contains("no such file: make a key with `keygen "));
    keygen(&path).unwrap();
    for mode in [0o604, 0o620, 0o601, 0o602, 0o610, 0o644] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        assert!(refused(&path).contains("chmod 600 the file"), "{mode:o}");
    }
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
    PrivateKey::read(&path).unwrap();

    // A link is followed, and the file at its end is checked.
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    PrivateKey::read(&link).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o604)).unwrap();
    assert!(refused(&link).contains("chmod 600 the file"));
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    let round = folder.path().join("round");
    symlink(&round, &round).unwrap();
    assert!(refused(&round).contains("cannot open the key file"));
    assert!(refused(folder.path()).contains("not a regular file"));
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(refused(&fifo).contains("not a regular file"));

    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        assert!(refused(&path).contains("it belongs to uid 65534, but this process runs as uid 0"));
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
    }
    // A group may read a file of root, if it is a group of this process. The group of another user's file may not.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o440)).unwrap();
    if rustix::process::geteuid().is_root() {
        let own = rustix::process::getegid().as_raw();
        std::os::unix::fs::chown(&path, Some(0), Some(own)).unwrap();
        PrivateKey::read(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o460)).unwrap();
        assert!(refused(&path).contains("chmod 600 the file"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o440)).unwrap();
        std::os::unix::fs::chown(&path, None, Some(65533)).unwrap();
        assert!(refused(&path).contains("its group 65533 may read it (mode 0440)"));
        std::os::unix::fs::chown(&path, None, Some(own)).unwrap();
    } else {
        assert!(refused(&path).contains("may read it (mode 0440)"));
    }
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(
        &path,
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    )
    .unwrap();
    assert!(refused(&path).contains("not a private Ed25519 key"));
    std::fs::write(&path, "").unwrap();
    assert!(refused(&path).contains("not a private Ed25519 key"));
}

#[test]
fn a_changed_roster_and_a_changed_key_count_without_a_restart() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let (key, roster) = (folder.path().join("key"), folder.path().join("roster"));
        let first = keygen(&key).unwrap();
        let load = || Identity::load(Auth::Require, &key, &roster);
        let error = load().unwrap_err();
        assert!(
            error[0]
                .to_string()
                .contains("roster: cannot read the roster"),
            "{error:?}"
        );
        std::fs::write(&roster, "").unwrap();
        let error = load().unwrap_err();
        let cure = format!("add {first}: {{name: NAME, roles: [ROLE]}}");
        assert!(error[0].to_string().contains(&cure), "{error:?}");

        let line = |key| format!("{key}: {{name: a, roles: [sender]}}\n");
        std::fs::write(&roster, line(first)).unwrap();
        let identity = load().unwrap();
        assert_eq!(identity.own().unwrap().roles, [Role::Sender]);
        let mut changes = identity.changes();
        let following = tokio::spawn(identity.clone().follow());

        // A roster with a mistake changes nothing, and the next good roster counts.
        std::fs::write(&roster, "nonsense\n").unwrap();
        let second_file = folder.path().join("second");
        let second = keygen(&second_file).unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(2500), changes.changed());
        quiet.await.unwrap_err();
        assert_eq!(identity.roster().len(), 1);
        std::fs::write(&roster, line(first) + &line(second)).unwrap();
        within("roster", changes.changed()).await.unwrap();
        assert_eq!(identity.roster().len(), 2);

        // The key may be replaced by a rename, as an operator does it.
        std::fs::rename(&second_file, &key).unwrap();
        within("key", async {
            while identity.public() != second {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        following.abort();
    });
}

/// Kubernetes mounts a secret as `key -> ..data/key` and `..data -> FOLDER`, and replaces the secret by a rename of
/// `..data`. The file that the process named never changes.
#[test]
fn a_secret_of_kubernetes_is_read_and_followed() {
    run(async {
        let mount = tempfile::tempdir().unwrap();
        let version = |number: &str| {
            let folder = mount.path().join(number);
            std::fs::create_dir(&folder).unwrap();
            let public = keygen(&folder.join("key")).unwrap();
            let text = format!("{public}: {{name: a, roles: [sender]}}\n");
            std::fs::write(folder.join("roster"), text).unwrap();
            let new = mount.path().join("..data_tmp");
            symlink(number, &new).unwrap();
            std::fs::rename(new, mount.path().join("..data")).unwrap();
            public
        };
        let first = version("..1");
        for name in ["key", "roster"] {
            symlink(Path::new("..data").join(name), mount.path().join(name)).unwrap();
        }
        let (key, roster) = (mount.path().join("key"), mount.path().join("roster"));
        let identity = Identity::load(Auth::Require, &key, &roster).unwrap();
        assert_eq!(identity.public(), first);
        let following = tokio::spawn(identity.clone().follow());
        let second = version("..2");
        within("key", async {
            while identity.public() != second {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert_eq!(identity.own().unwrap().roles, [Role::Sender]);
        following.abort();
    });
}

/// A proxy can name further peers. It can change nothing that the file says, and name no proxy.
#[test]
fn peers_that_a_proxy_names_are_known_beside_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let keys = ["own", "front", "other", "evil"].map(|name| (name, keygen(&path(name)).unwrap()));
    let [(_, own), (_, front), (_, other), (_, evil)] = keys;
    let roster = path("roster");
    let text = format!(
        "{own}: {{name: own, roles: [sender]}}\n{front}: {{name: front, roles: [proxy]}}\n"
    );
    std::fs::write(&roster, &text).unwrap();
    let identity = Identity::load(Auth::Require, &path("own"), &roster).unwrap();
    let peer = |key: PublicKey, name: &str, roles: &[&str]| Peer {
        key: key.to_string(),
        name: name.to_owned(),
        roles: roles.iter().map(|&role| role.to_owned()).collect(),
        hosts: vec!["10.0.0.2".to_owned()],
        replicas: false,
    };
    let known = |key: PublicKey| {
        let roster = identity.roster();
        let member = roster.member(&key).cloned();
        member.map(|member| (member.name.to_string(), member.roles))
    };
    assert_eq!(
        identity.learn(&[peer(other, "other", &["receiver"])]),
        Ok(1)
    );
    assert_eq!(
        known(other),
        Some(("other".to_owned(), vec![Role::Receiver]))
    );
    assert!(!identity.roster().member(&other).unwrap().is_at("10.0.0.3"));

    // Keys and names of the file stay as they are.
    for claim in [
        peer(own, "another", &["receiver"]),
        peer(front, "front", &["receiver"]),
        peer(evil, "own", &["sender"]),
        peer(evil, "front", &["sender"]),
    ] {
        assert_eq!(
            identity.learn(std::slice::from_ref(&claim)),
            Ok(0),
            "{claim:?}"
        );
        assert_eq!(known(own), Some(("own".to_owned(), vec![Role::Sender])));
        assert_eq!(known(front), Some(("front".to_owned(), vec![Role::Proxy])));
        assert_eq!(known(evil), None);
        assert_eq!(known(other), None, "each list replaces the list before");
    }
    assert_eq!(
        identity.learn(&[peer(other, "other", &["receiver"])]),
        Ok(1)
    );
    for (wrong, expected) in [
        (
            peer(evil, "evil", &["proxy"]),
            "a proxy may not name proxies",
        ),
        (
            peer(evil, "evil", &["sender", "proxy"]),
            "a proxy may not name proxies",
        ),
        (peer(evil, "evil", &[]), "roles: write a list"),
        (peer(evil, "a b", &["sender"]), "name: write 1 to 128"),
        (
            Peer {
                key: "ssh-rsa".to_owned(),
                ..peer(evil, "evil", &["sender"])
            },
            "key: not a public key",
        ),
    ] {
        let mistakes = identity.learn(&[wrong]).unwrap_err().join("\n");
        assert!(mistakes.contains(expected), "{mistakes}");
        assert!(known(other).is_some(), "a faulty list changes nothing");
    }
    // A changed file is read again, and the peers stay.
    std::fs::write(
        &roster,
        text + &format!("{evil}: {{name: evil, roles: [sender]}}\n"),
    )
    .unwrap();
    identity.reread();
    assert_eq!(identity.roster().len(), 4);
    // A proxy names what the roster has, without the proxies.
    let names: Vec<_> = identity.peers().into_iter().map(|peer| peer.name).collect();
    assert!(
        names.len() == 3 && !names.contains(&"front".to_owned()),
        "{names:?}"
    );
}
