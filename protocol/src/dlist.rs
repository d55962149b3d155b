//! LMCache's pickled NIXL descriptor lists, built and parsed by pattern, never unpickled.

/// One descriptor: a slot of a peer's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Address in the peer's process.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// NIXL device id: the tensor-parallel rank with LMCache, for host memory too.
    pub device: u64,
}

/// NIXL's memory types that carry KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Host memory, 0.
    Dram,
    /// GPU memory, 1.
    Vram,
}
