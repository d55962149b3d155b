//! Lets NIXL register buffers.

use super::Buffer;

// SAFETY: a memfd is mapped once, at one place, until the buffer is dropped, and is sealed against shrinking.
// GPU memory is allocated once and freed when the buffer is dropped. All access goes through raw copies,
// system calls and the driver, so no reference into either memory exists.
unsafe impl nixl::Pinned for Buffer {
    fn address(&self) -> usize {
        Self::address(self)
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
