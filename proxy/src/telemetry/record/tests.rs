use super::*;

#[test]
fn notices_of_ranks_add_up() {
    let notice = |ok, bytes, us, transport: &str| NotifX {
        ok,
        reason: (!ok).then_some(Reason::NoRoom),
        bytes,
        us,
        transport: transport.into(),
        ..NotifX::example()
    };
    let mut moved = Moved::default();
    moved.add(Some(&notice(true, 10, 7, "nixl")));
    moved.add(Some(&notice(true, 20, 5, "nixl")));
    assert_eq!((moved.ok, moved.bytes, moved.us), (true, 30, 7));
    moved.add(Some(&notice(false, 0, 0, "")));
    assert_eq!((moved.ok, moved.reason), (false, Some(Reason::NoRoom)));
    moved.add(None);
    assert_eq!((moved.ok, moved.ranks), (false, 4));
    assert_eq!(moved.transport, "nixl");
}

#[test]
fn transports_of_strangers_are_not_repeated() {
    let check = |text: &str, expect: &str| assert_eq!(transport_name(text), expect);
    check("nixl", "nixl");
    check("nixl:posix_shm", "nixl:posix_shm");
    check("tcp", "tcp");
    check("cuda_ipc", "cuda_ipc");
    check("", "");
    check("evil\nline", "other");
    check("nixlevil", "other");
}

#[test]
fn the_oldest_go() {
    let recent = Recent::default();
    for i in 0..300 {
        recent.push(Record {
            id: i.to_string(),
            ..Record::default()
        });
    }
    let all = recent.all();
    assert_eq!((all.len(), all[0].id.as_str()), (KEPT, "44"));
    assert!(recent.amend("299", None));
    assert!(!recent.amend("3", None));
}
