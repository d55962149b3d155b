//! Buffers as NIXL wants them.

use super::{Buffer, Memory};

// SAFETY: a memfd is mapped once, at one place, until the buffer is dropped, and is sealed against
// shrinking; all access goes through raw copies and system calls, so no reference into it exists.
unsafe impl nixl::Pinned for Buffer {
    fn address(&self) -> usize {
        match &self.memory {
            Memory::Memfd(memory) => memory.address(),
        }
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
