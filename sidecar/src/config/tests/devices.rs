//! The device of each rank's buffer.

use super::*;

#[test]
fn each_rank_has_its_device() {
    let gpu = |n| Some(Which::Ordinal(n));
    let text = "6f5e1a2b-0c3d-4e5f-8a9b-c0d1e2f30415";
    let uuid = Some(Which::Uuid(text.parse().unwrap()));
    let listed = format!("[cuda:3, 'cuda:GPU-{text}']");
    for (device, expect) in [
        ("cpu", [None, None]),
        ("cuda", [gpu(0), gpu(1)]),
        ("[cuda:1, cuda:0]", [gpu(1), gpu(0)]),
        ("[cpu, cuda]", [None, gpu(1)]),
        ("'cuda:1,cuda:0'", [gpu(1), gpu(0)]),
        (&listed, [gpu(3), uuid]),
    ] {
        let (config, _) = load(&format!("{RECEIVER}pd_buffer_device: {device}\n"));
        assert_eq!(config.devices, expect, "{device}");
    }
    let (config, _) = load(&format!("{SENDER}pd_buffer_device: cuda:5\n"));
    assert_eq!(config.devices, [gpu(5)]);
}
