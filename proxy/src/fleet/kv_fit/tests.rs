use protocol::groups::Group;

use super::*;

/// Returns the KV description of an engine with this many layers.
pub(crate) fn kv(layers: u32) -> Kv {
    Kv {
        version: 1,
        ranks: 1,
        layout: Some(Layout {
            model: "m".into(),
            dtype: "float".into(),
            layers,
            kv_heads: 2,
            head_size: 64,
            mla: false,
            chunk_tokens: 256,
            ..Layout::example()
        }),
        ..Kv::default()
    }
}

fn group() -> Group {
    Group {
        kind: "window".into(),
        bytes: 8,
        size: 64,
    }
}

#[test]
fn what_differs_is_named_with_its_cure() {
    let text = kv(4).misfit(&kv(5)).unwrap();
    assert_eq!(
        text,
        "layers is 4 on the prefill side and 5 on the decode side: start both engines with the same \
         model, and with the same draft model or with none"
    );
    let two = Kv { ranks: 2, ..kv(4) };
    assert!(kv(4).misfit(&two).unwrap().contains("`ranks` of both"));
    let other = Kv {
        version: 2,
        ..kv(4)
    };
    assert!(kv(4).misfit(&other).unwrap().contains("same release"));
    let mut grouped = kv(4);
    grouped.layout.as_mut().unwrap().groups = vec![group()];
    assert_eq!(
        kv(4).misfit(&grouped).unwrap(),
        "groups is no groups on the prefill side and 1 group on the decode side: start both engines with the \
         same model and the same vLLM options, and run the same release of the connector on both sides"
    );
    let unmoved = Kv {
        unmoved: "heads of two sizes".into(),
        ..Kv::default()
    };
    assert_eq!(
        kv(4).misfit(&unmoved).unwrap(),
        "the decode engine moves no KV: heads of two sizes"
    );
    assert!(unmoved.misfit(&kv(4)).unwrap().contains("prefill engine"));
}

#[test]
fn misfit_and_fits_say_the_same_and_what_is_not_said_decides_nothing() {
    let silent = Kv::default();
    let mut grouped = kv(4);
    grouped.layout.as_mut().unwrap().groups = vec![group()];
    let all = [
        grouped,
        silent.clone(),
        kv(4),
        kv(5),
        Kv { ranks: 2, ..kv(4) },
        Kv {
            version: 9,
            ..kv(4)
        },
        Kv {
            unmoved: "no".into(),
            ..kv(4)
        },
        Kv {
            release: "0.2.0".into(),
            ..kv(4)
        },
    ];
    for one in &all {
        for other in &all {
            assert_eq!(
                one.fits(other),
                one.misfit(other).is_none(),
                "{one:?} {other:?}"
            );
        }
    }
    assert!(silent.fits(&kv(4)) && kv(4).fits(&silent) && kv(4).fits(&kv(4)));
}
