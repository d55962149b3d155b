//! LMCache's pickled NIXL descriptor lists. This module builds and parses such lists as fixed byte
//! patterns. It never unpickles a list.
//!
//! LMCache sends `pickle.dumps(nixlXferDList)`. The pickle of a descriptor list always consists of
//! the same few opcodes around a string in NIXL's own serialisation. This module writes exactly
//! those bytes and accepts nothing else, so a peer cannot make the sidecar load or run any code.
//!
//! ```text
//! PROTO 4 · FRAME · "nixl._bindings" · MEMO · "nixlXferDList" · MEMO · STACK_GLOBAL · MEMO
//!         · EMPTY_TUPLE · NEWOBJ · MEMO · BYTES state · MEMO · BUILD · STOP
//! state = "nixlSerDes|" "nixlDList" len "nixlBDList|" "t" 4 i32 memory| "n" 8 u64 count| "" len rows|
//! row   = u64 address · u64 bytes · u64 device, little endian
//! ```

use crate::serdes::Fields;

/// One descriptor: a slot of a peer's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Address in the peer's process.
    pub address: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// NIXL device id. LMCache writes its tensor-parallel rank into this field, even for host
    /// memory.
    pub device: u64,
}

/// NIXL's types of memory that can contain KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Host memory, 0.
    Dram,
    /// GPU memory, 1.
    Vram,
}

/// Error of [`parse`]: the bytes are not a descriptor list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a pickled nixlXferDList: {0}")]
pub struct DlistError(&'static str);

/// Builds the pickle of a descriptor list, byte for byte as CPython's `pickle` does.
///
/// The pickle contains the module name `nixl._bindings`, an alias that both wheels (`nixl_cu12`,
/// `nixl_cu13`) provide. A peer with the other wheel could not import the real name of the module.
pub fn build(rows: &[Row], memory: Memory) -> Vec<u8> {
    build_for(MODULE, rows, memory)
}

/// Parses the pickle of a descriptor list.
///
/// # Errors
/// Returns an error if the bytes are not exactly this sequence of opcodes and fields, or if the count differs from the
/// number of rows.
pub fn parse(pickle: &[u8]) -> Result<(Memory, Vec<Row>), DlistError> {
    let mut rest = Pickle(pickle);
    rest.expect(PROTO, "no protocol 4")?;
    rest.skip_frame()?;
    rest.short_text()?;
    rest.expect(&[MEMOIZE], "module not memoized")?;
    if rest.short_text()? != CLASS {
        return Err(DlistError("another class"));
    }
    rest.expect(NEW_OBJECT, "no plain object")?;
    rest.skip_frame()?;
    let state = rest.bytes()?;
    rest.skip_frame()?;
    rest.expect(TAIL, "no plain state")?;
    if !rest.0.is_empty() {
        return Err(DlistError("trailing bytes"));
    }
    parse_state(state)
}

fn build_for(module: &[u8], rows: &[Row], memory: Memory) -> Vec<u8> {
    let state = build_state(rows, memory);
    let mut head = Vec::with_capacity(64);
    for text in [module, CLASS] {
        head.push(SHORT_BINUNICODE);
        head.push(u8::try_from(text.len()).expect("both names are short constants"));
        head.extend_from_slice(text);
        head.push(MEMOIZE);
    }
    head.extend_from_slice(&NEW_OBJECT[1..]);

    // CPython puts the pickle into one frame, but leaves objects of 64 KiB and more outside the
    // frame.
    let inside = state.len() < FRAME_TARGET;
    let mut bytes = Vec::with_capacity(state.len() + 16);
    match u8::try_from(state.len()) {
        Ok(len) => bytes.extend_from_slice(&[SHORT_BINBYTES, len]),
        Err(_) => {
            let len = u32::try_from(state.len()).expect("fewer than 2^27 slots");
            bytes.push(BINBYTES);
            bytes.extend_from_slice(&len.to_le_bytes());
        }
    }
    bytes.extend_from_slice(&state);
    bytes.extend_from_slice(TAIL);

    let framed = if inside {
        head.len() + bytes.len()
    } else {
        head.len()
    };
    let mut pickle = Vec::with_capacity(head.len() + bytes.len() + 16);
    pickle.extend_from_slice(PROTO);
    pickle.push(FRAME);
    pickle.extend_from_slice(&(framed as u64).to_le_bytes());
    pickle.extend_from_slice(&head);
    pickle.extend_from_slice(&bytes);
    pickle
}

fn build_state(rows: &[Row], memory: Memory) -> Vec<u8> {
    let mut state = Fields::begin(80 + ROW_BYTES * rows.len());
    state.put("nixlDList", b"nixlBDList");
    let memory: i32 = match memory {
        Memory::Dram => 0,
        Memory::Vram => 1,
    };
    state.put("t", &memory.to_le_bytes());
    state.put("n", &(rows.len() as u64).to_le_bytes());
    if !rows.is_empty() {
        let mut raw = Vec::with_capacity(ROW_BYTES * rows.len());
        for row in rows {
            for word in [row.address, row.bytes, row.device] {
                raw.extend_from_slice(&word.to_le_bytes());
            }
        }
        state.put("", &raw);
    }
    state.finish()
}

fn parse_state(state: &[u8]) -> Result<(Memory, Vec<Row>), DlistError> {
    let mut fields = Fields::read(state).ok_or(DlistError("state is not nixlSerDes"))?;
    if fields.take("nixlDList") != Some(b"nixlBDList") {
        return Err(DlistError("state is not a plain descriptor list"));
    }
    let memory = match fields.take("t") {
        Some([0, 0, 0, 0]) => Memory::Dram,
        Some([1, 0, 0, 0]) => Memory::Vram,
        _ => return Err(DlistError("neither host nor GPU memory")),
    };
    let count = fields
        .take("n")
        .and_then(|n| n.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or(DlistError("no count"))?;
    let raw = match count {
        0 => &[],
        _ => fields.take("").ok_or(DlistError("no rows"))?,
    };
    if !fields.is_empty() {
        return Err(DlistError("more fields than expected"));
    }
    let (words, remainder) = raw.as_chunks::<8>();
    if !remainder.is_empty() || Some(raw.len() as u64) != count.checked_mul(ROW_BYTES as u64) {
        return Err(DlistError("count and rows differ"));
    }
    let rows = words
        .chunks_exact(3)
        .map(|row| Row {
            address: u64::from_le_bytes(row[0]),
            bytes: u64::from_le_bytes(row[1]),
            device: u64::from_le_bytes(row[2]),
        })
        .collect();
    Ok((memory, rows))
}

/// Part of a pickle that has not been read yet.
struct Pickle<'a>(&'a [u8]);

impl<'a> Pickle<'a> {
    fn expect(&mut self, opcodes: &[u8], error: &'static str) -> Result<(), DlistError> {
        self.0 = self.0.strip_prefix(opcodes).ok_or(DlistError(error))?;
        Ok(())
    }

    /// Skips a frame header. A frame is only a hint to read ahead, so its length is not checked.
    fn skip_frame(&mut self) -> Result<(), DlistError> {
        if self.0.first() == Some(&FRAME) {
            self.take(9)?;
        }
        Ok(())
    }

    fn short_text(&mut self) -> Result<&'a [u8], DlistError> {
        self.expect(&[SHORT_BINUNICODE], "no short string")?;
        let len = self.take(1)?[0];
        self.take(usize::from(len))
    }

    fn bytes(&mut self) -> Result<&'a [u8], DlistError> {
        let len = match self.take(1)? {
            [SHORT_BINBYTES] => u64::from(self.take(1)?[0]),
            [BINBYTES] => {
                let len = self.take(4)?;
                u64::from(u32::from_le_bytes([len[0], len[1], len[2], len[3]]))
            }
            _ => return Err(DlistError("state is not bytes")),
        };
        self.take(usize::try_from(len).map_err(|_| DlistError("truncated"))?)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], DlistError> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(DlistError("truncated"))?;
        self.0 = rest;
        Ok(taken)
    }
}

const MODULE: &[u8] = b"nixl._bindings";
const CLASS: &[u8] = b"nixlXferDList";
const ROW_BYTES: usize = 24;
/// `_FRAME_SIZE_TARGET` of CPython's pickler.
const FRAME_TARGET: usize = 64 * 1024;

const PROTO: &[u8] = &[0x80, 4];
const FRAME: u8 = 0x95;
const SHORT_BINUNICODE: u8 = 0x8c;
const MEMOIZE: u8 = 0x94;
const SHORT_BINBYTES: u8 = 0x43;
const BINBYTES: u8 = 0x42;
/// MEMOIZE (the class name), STACK_GLOBAL, MEMOIZE, EMPTY_TUPLE, NEWOBJ, MEMOIZE.
const NEW_OBJECT: &[u8] = &[MEMOIZE, 0x93, MEMOIZE, 0x29, 0x81, MEMOIZE];
/// MEMOIZE, BUILD, STOP.
const TAIL: &[u8] = &[MEMOIZE, 0x62, 0x2e];

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: u64, device: u64) -> Vec<Row> {
        (0..n)
            .map(|i| Row {
                address: 0x7f00_0000_0000 + 0x10_0000 * i,
                bytes: 0x10_0000,
                device,
            })
            .collect()
    }

    /// CPython's `pickle` wrote the fixtures, with NIXL 1.5.1.
    #[test]
    fn is_what_python_writes() {
        let dram: &[u8] = include_bytes!("../fixtures/dlist_dram_3.bin");
        let vram: &[u8] = include_bytes!("../fixtures/dlist_vram_3.bin");
        for (fixture, memory, device) in [(dram, Memory::Dram, 0), (vram, Memory::Vram, 3)] {
            let rows = rows(3, device);
            assert_eq!(build_for(b"nixl_cu13._bindings", &rows, memory), fixture);
            assert_eq!(parse(fixture), Ok((memory, rows)));
        }
    }

    #[test]
    fn any_count_comes_back() {
        for n in [0, 1, 7, 8, 2727, 2728, 2729, 50_000] {
            for memory in [Memory::Dram, Memory::Vram] {
                let rows = rows(n, 1);
                let pickle = build(&rows, memory);
                assert_eq!(parse(&pickle), Ok((memory, rows)), "{n} rows");
            }
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let good = build(&rows(3, 0), Memory::Dram);
        for len in 0..good.len() {
            assert!(parse(&good[..len]).is_err(), "cut to {len}");
        }
        assert_eq!(
            parse(&[&good[..], b"x"].concat()),
            Err(DlistError("trailing bytes"))
        );
        // A pickle that runs os.system("true") when it is unpickled.
        let call = b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.";
        assert_eq!(parse(call), Err(DlistError("another class")));
        // A count that exceeds the number of rows, or that overflows, is refused.
        let count = good
            .windows(9)
            .position(|w| w == b"n\x08\0\0\0\0\0\0\0")
            .unwrap()
            + 9;
        for wrong in [0, 2, 4, u64::MAX, 1 << 61] {
            let mut bad = good.clone();
            bad[count..count + 8].copy_from_slice(&u64::to_le_bytes(wrong));
            assert!(parse(&bad).is_err(), "{wrong} rows claimed");
        }
    }
}
