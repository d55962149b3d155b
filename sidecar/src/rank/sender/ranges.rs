//! Divides writes by ranges of layers: the KV of the first layers is in flight while the engine computes the
//! last layers.

use std::time::{Duration, Instant};

use protocol::Layout;
use protocol::local::LayersStaged;
use protocol::sender::Piece;

/// Divides a write by ranges of layers. Returns for each range the event that it waits for and the pieces to
/// write after the event.
///
/// A chunk is `[planes, layers, tokens, width]`, so a range of layers is one run of bytes in each plane. Runs
/// begin at multiples of the link's `granule`; a granule in which two ranges meet belongs to the later range.
/// So no byte is in two writes. If a byte were in two writes, the earlier write could arrive last and
/// overwrite a new byte with an old byte.
///
/// Returns `None` if the ranges do not cover all layers, if runs would be shorter than a granule, or if the layout
/// has groups: the layers of a chunk are then not one run of bytes in each plane.
pub(super) fn divide(
    pieces: &[Piece],
    layers: &[LayersStaged],
    layout: &Layout,
    granule: u64,
) -> Option<Vec<(u32, Vec<Piece>)>> {
    let ascending = layers.windows(2).all(|pair| pair[0].below < pair[1].below);
    let whole = layers
        .last()
        .is_some_and(|last| last.below == layout.layers);
    let first = layers.first().is_some_and(|first| first.below > 0);
    let plain = layout.groups.is_empty();
    if layers.len() < 2 || !ascending || !whole || !first || granule == 0 || !plain {
        return None;
    }
    let planes = if layout.mla { 1 } else { 2 };
    let mut divided: Vec<(u32, Vec<Piece>)> = layers
        .iter()
        .map(|range| (range.event, Vec::new()))
        .collect();
    for piece in pieces {
        let layer_bytes = piece.bytes / (planes * u64::from(layout.layers));
        if layer_bytes * planes * u64::from(layout.layers) != piece.bytes {
            return None;
        }
        let mut at = 0;
        for plane in 0..planes {
            let start = plane * u64::from(layout.layers) * layer_bytes;
            for (index, range) in layers.iter().enumerate() {
                let end = start + u64::from(range.below) * layer_bytes;
                let is_last = index + 1 == layers.len();
                let end = match (is_last, plane + 1 == planes) {
                    (true, true) => end,
                    // The run after this one is in the next plane and belongs to the first range. The granule
                    // that the two runs share belongs to the last range.
                    (true, false) => end.next_multiple_of(granule),
                    (false, _) => end / granule * granule,
                };
                if end < at + granule.min(layer_bytes) {
                    return None;
                }
                divided[index].1.push(Piece {
                    offset: at,
                    bytes: end - at,
                    ..*piece
                });
                at = end;
            }
        }
    }
    Some(divided)
}

/// Returns the time in which the wire was busy. The spans are in order and may overlap.
pub(super) fn busy(spans: impl Iterator<Item = (Instant, Instant)>) -> Duration {
    let mut until: Option<Instant> = None;
    let mut busy = Duration::ZERO;
    for (began, ended) in spans {
        let from = until.map_or(began, |until| began.max(until));
        busy += ended.saturating_duration_since(from);
        until = Some(until.map_or(ended, |until| until.max(ended)));
    }
    busy
}

/// Returns true if, at the measured link speed in GB/s, sending a step's first layers early saves more time
/// than it costs.
///
/// Posting a part and checking its end takes about 10 µs. If 2 GB are gathered and sent while an H200
/// computes, the computation takes 1 to 9 ms longer, at any link speed. If the wire needs no more than these
/// milliseconds for the whole write, dividing the write gains nothing.
pub(super) fn is_worth_dividing(rate: f64, bytes: u64, below_gb_s: u32) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let takes = bytes as f64 / (rate * 1e9);
    rate < f64::from(below_gb_s) && takes > DIVIDE_FROM.as_secs_f64()
}

/// Minimum duration of a write that is divided.
const DIVIDE_FROM: Duration = Duration::from_micros(200);

#[cfg(test)]
mod tests {
    use protocol::SlotIndex;
    use protocol::groups::Group;

    use super::*;

    fn layout(layers: u32, mla: bool) -> Layout {
        Layout {
            model: "m".into(),
            dtype: "bfloat16".into(),
            layers,
            kv_heads: 1,
            head_size: 1,
            mla,
            chunk_tokens: 256,
            ..Layout::example()
        }
    }

    fn piece(bytes: u64) -> Piece {
        Piece {
            from: SlotIndex(3),
            to: SlotIndex(5),
            offset: 0,
            bytes,
        }
    }

    fn ranges(below: &[u32]) -> Vec<LayersStaged> {
        let range = |(event, &below)| LayersStaged { below, event };
        (10..).zip(below).map(range).collect()
    }

    #[test]
    fn every_byte_is_written_once_and_not_before_its_layer() {
        for (layers, mla, layer_bytes, granule, below) in [
            (32, false, 1000, 1, &[16, 28, 32][..]),
            (32, false, 4096, 4096, &[8, 16, 24, 28, 32]),
            (28, false, 5000, 4096, &[14, 24, 28]),
            (27, true, 9216, 4096, &[13, 27]),
            (4, false, 65536, 65536, &[2, 4]),
        ] {
            let planes = if mla { 1 } else { 2 };
            let bytes = planes * u64::from(layers) * layer_bytes;
            let of = layout(layers, mla);
            let divided = divide(&[piece(bytes)], &ranges(below), &of, granule).unwrap();
            let mut runs: Vec<(u64, u64, u32)> = Vec::new();
            for (event, pieces) in &divided {
                for p in pieces {
                    assert_eq!(p.offset % granule, 0);
                    runs.push((p.offset, p.bytes, *event));
                }
            }
            runs.sort_unstable();
            let mut at = 0;
            for (offset, bytes, event) in runs {
                assert_eq!(offset, at);
                at += bytes;
                let last = (offset + bytes - 1) / layer_bytes % u64::from(layers);
                let first = offset / layer_bytes % u64::from(layers);
                let below = u64::from(below[(event - 10) as usize]);
                assert!(
                    first < below && last < below
                        || event + 1 == 10 + u32::try_from(divided.len()).unwrap()
                );
            }
            assert_eq!(at, bytes);
        }
    }

    #[test]
    fn the_wire_is_busy_without_pauses_and_overlaps() {
        let start = Instant::now();
        let check = |spans: &[(u64, u64)], expect| {
            let at = |ms| start + Duration::from_millis(ms);
            let spans = spans.iter().map(|&(began, ended)| (at(began), at(ended)));
            assert_eq!(busy(spans), Duration::from_millis(expect));
        };
        check(&[], 0);
        check(&[(1, 3), (10, 11)], 3);
        check(&[(1, 5), (3, 6)], 5);
        check(&[(1, 9), (3, 6), (8, 10)], 9);
    }

    #[test]
    fn what_is_no_division_of_all_layers_is_not_divided() {
        let check = |below: &[u32], bytes, granule| {
            divide(&[piece(bytes)], &ranges(below), &layout(4, false), granule)
        };
        assert!(check(&[2, 4], 800, 1).is_some());
        for below in [
            &[][..],
            &[4],
            &[2, 3],
            &[2, 5],
            &[3, 2, 4],
            &[2, 2, 4],
            &[0, 4],
        ] {
            assert!(check(below, 800, 1).is_none(), "{below:?}");
        }
        assert!(check(&[2, 4], 801, 1).is_none(), "no whole layers");
        assert!(check(&[2, 4], 800, 4096).is_none(), "runs within a granule");
    }

    #[test]
    fn a_layout_with_groups_is_not_divided() {
        let group = Group {
            kind: "full".into(),
            bytes: 8,
            size: 0,
        };
        let grouped = Layout {
            groups: vec![group],
            ..layout(4, false)
        };
        assert!(divide(&[piece(800)], &ranges(&[2, 4]), &grouped, 1).is_none());
    }

    #[test]
    fn only_long_writes_over_slow_wires_are_divided() {
        let cases = [
            (7.0, 256 << 20, 100, true),
            (50.0, 256 << 20, 100, true),
            (350.0, 2 << 30, 100, false),
            (50.0, 4 << 20, 100, false),
            (350.0, 256 << 20, 1000, true),
            (0.5, 256 << 20, 0, false),
        ];
        for (rate, bytes, below, worth) in cases {
            assert_eq!(
                is_worth_dividing(rate, bytes, below),
                worth,
                "{bytes} bytes at {rate} GB/s, below {below}"
            );
        }
    }
}
