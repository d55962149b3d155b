//! Receives the pieces of a protected write.

use std::time::Instant;

use super::frame::Refusal;
use super::pieces::{Rest, piece};
use super::reader::{End, Reader, cut_off};
use super::seal::{Forged, Seal, TAG_BYTES};
use super::slot_gate::{Pass, SlotLayout};
use crate::memory::{Inlet, PIECE_BYTES};

impl Reader {
    /// Moves the frame's pieces into their slots and verifies the tag of each. Returns the reason if a gate was closed
    /// meanwhile.
    ///
    /// Bytes whose tag is not verified yet may lie in an open slot: the kernel copies them there, and the pass over them
    /// finds them in the cache. No engine sees them, because the sender reports a chunk as written only after the answer to
    /// this frame, which has a tag of its own. Encrypted bytes wait in a block instead, and are decrypted into the slot.
    pub(super) fn land_protected(
        &self,
        inlet: &mut Inlet,
        seal: &mut Seal,
        layout: &SlotLayout,
        passes: &[Pass],
        rest: &mut Rest,
        deadline: Instant,
    ) -> Result<Option<Refusal>, End> {
        let mut block = match seal.encrypts() {
            true => vec![0; PIECE_BYTES],
            false => Vec::new(),
        };
        for pass in passes {
            let mut done = 0;
            while done < pass.bytes {
                let len = piece(pass.bytes - done);
                let offset = pass.offset + done;
                let closed = match seal.encrypts() {
                    true => {
                        self.fill_within(&mut block[..len], rest.total(), deadline)?;
                        rest.bytes -= len as u64;
                        false
                    }
                    false => !self.recv_piece(inlet, layout, pass, offset, len, rest, deadline)?,
                };
                if closed {
                    seal.skip(rest.tags);
                    self.discard(rest.total(), deadline)?;
                    return Ok(Some(Refusal::Closed));
                }
                let mut tag = [0; TAG_BYTES];
                self.fill_within(&mut tag, rest.total(), deadline)?;
                rest.tags -= 1;
                let settled = layout.through(pass, || {
                    inlet.settle(offset, len, |slot| match seal.encrypts() {
                        true => seal.decrypt(&block[..len], &tag, slot).is_ok(),
                        false => seal.check(slot, &tag).is_ok(),
                    })
                });
                match settled {
                    Some(Ok(true)) => {}
                    Some(Ok(false)) => return Err(Forged.into()),
                    Some(Err(error)) => return Err(error.into()),
                    None => {
                        seal.skip(rest.tags + 1);
                        self.discard(rest.total(), deadline)?;
                        return Ok(Some(Refusal::Closed));
                    }
                }
                done += len as u64;
            }
        }
        Ok(None)
    }

    /// Receives the bytes of one piece into its slot. Returns false if the gate was closed meanwhile.
    #[expect(
        clippy::too_many_arguments,
        reason = "the state of one frame, which only two functions share"
    )]
    fn recv_piece(
        &self,
        inlet: &mut Inlet,
        layout: &SlotLayout,
        pass: &Pass,
        offset: u64,
        len: usize,
        rest: &mut Rest,
        deadline: Instant,
    ) -> Result<bool, End> {
        let mut at = 0;
        while at < len {
            let received = layout.through(pass, || {
                inlet.recv_piece(&*self.socket, offset, at, len - at)
            });
            match received {
                None => return Ok(false),
                Some(Ok(0)) => return Err(cut_off().into()),
                Some(Ok(n)) => {
                    at += n;
                    rest.bytes -= n as u64;
                }
                Some(Err(error)) => self.retry(error, rest.total(), deadline)?,
            }
        }
        Ok(true)
    }
}
