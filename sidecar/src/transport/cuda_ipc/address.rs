//! Encodes the address of a receiver's buffer: `GPU-UUID/bytes/handle`, with the handle in hexadecimal.

use std::fmt;
use std::str::FromStr;

use crate::memory::cuda::{DeviceMemory, HANDLE_BYTES, Handle, Uuid};

/// The data that a peer needs to open a buffer in GPU memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// The UUID of the GPU that holds the buffer.
    pub(super) uuid: Uuid,
    /// Bytes of the buffer.
    pub(super) bytes: u64,
    /// The buffer's IPC handle.
    pub(super) handle: Handle,
}

impl Address {
    pub(super) fn of(memory: &DeviceMemory) -> Self {
        Self {
            uuid: memory.device().uuid(),
            bytes: memory.bytes(),
            handle: *memory.handle(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/", self.uuid, self.bytes)?;
        self.handle.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("the receiver's description of its GPU buffer is not valid: {text:?}");
        let mut parts = text.split('/');
        let (Some(uuid), Some(bytes), Some(hex), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let mut handle = [0; HANDLE_BYTES];
        if hex.len() != 2 * HANDLE_BYTES || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        for (i, byte) in handle.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self {
            uuid: uuid.parse().map_err(|()| wrong())?,
            bytes: bytes.parse().map_err(|_| wrong())?,
            handle,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "GPU-6f5e1a2b-0c3d-4e5f-8a9b-c0d1e2f30415";

    #[test]
    fn an_address_comes_back() {
        let mut handle = [0; HANDLE_BYTES];
        handle[0] = 0xff;
        handle[63] = 1;
        let address = Address {
            uuid: UUID.parse().unwrap(),
            bytes: 4 << 30,
            handle,
        };
        let text = address.to_string();
        assert!(text.starts_with("GPU-6f5e1a2b-0c3d-4e5f-8a9b-c0d1e2f30415/4294967296/ff00"));
        assert_eq!(text.parse(), Ok(address));
    }

    #[test]
    fn nonsense_is_refused() {
        let hex = "0".repeat(128);
        for bad in [
            String::new(),
            UUID.to_owned(),
            format!("{UUID}/1/{hex}/"),
            format!("{UUID}/-1/{hex}"),
            format!("{UUID}/1/{}", &hex[1..]),
            format!("{UUID}/1/{}+1", &hex[2..]),
            format!("{UUID}/1/{}é", &hex[2..]),
            format!("cuda:0/1/{hex}"),
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
