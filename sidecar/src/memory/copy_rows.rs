//! Copies many small pieces at equal distances. In GPU memory one call of the driver copies all pieces,
//! because each call takes about ten microseconds, even if it copies only a few bytes.

use std::io;

use super::{Buffer, Memory, Rows};

impl Buffer {
    /// Copies pieces out of the buffer into one contiguous block.
    ///
    /// # Errors
    /// `InvalidInput` if pieces overlap, do not fill the block or lie outside of the buffer. For GPU memory
    /// also the driver's error.
    pub(crate) fn copy_out_rows(&self, rows: Rows, into: &mut [u8]) -> io::Result<()> {
        let count = self.count(rows, into.len())?;
        match &self.memory {
            Memory::Cuda(memory) if count > 0 => Ok(memory.read_rows(rows, into)?),
            Memory::Cuda(_) => Ok(()),
            Memory::Memfd(memory) => {
                let places = (0..).map(|i| rows.offset + i * rows.step);
                let mut pieces = into.chunks_exact_mut(rows.width).zip(places);
                pieces.try_for_each(|(piece, at)| memory.read(at, piece))
            }
        }
    }

    /// Copies the pieces of a block into the buffer.
    ///
    /// # Errors
    /// The same errors as [`Buffer::copy_out_rows`].
    pub(crate) fn copy_in_rows(&self, rows: Rows, from: &[u8]) -> io::Result<()> {
        let count = self.count(rows, from.len())?;
        match &self.memory {
            Memory::Cuda(memory) if count > 0 => Ok(memory.write_rows(rows, from)?),
            Memory::Cuda(_) => Ok(()),
            Memory::Memfd(memory) => {
                let places = (0..).map(|i| rows.offset + i * rows.step);
                let mut pieces = from.chunks_exact(rows.width).zip(places);
                pieces.try_for_each(|(piece, at)| memory.write(at, piece))
            }
        }
    }

    /// Returns the number of pieces in a block of `len` bytes, or an error if the pieces overlap, do not fill
    /// the block or lie outside of the buffer.
    fn count(&self, rows: Rows, len: usize) -> io::Result<u64> {
        let odd = || {
            let text = format!("{len} bytes do not divide into the pieces of {rows:?}");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        };
        let width = rows.width as u64;
        if width == 0 || rows.step < width || !len.is_multiple_of(rows.width) {
            return Err(odd());
        }
        let count = (len / rows.width) as u64;
        if let Some(last) = count.checked_sub(1) {
            let at = last.checked_mul(rows.step).ok_or_else(odd)?;
            self.range(rows.offset.checked_add(at).ok_or_else(odd)?, width)?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(offset: u64, step: u64, width: usize) -> Rows {
        Rows {
            offset,
            step,
            width,
        }
    }

    #[test]
    fn pieces_go_where_single_copies_would_go() {
        let buffer = Buffer::memfd("rows", 100).unwrap();
        let block: Vec<u8> = (1..=12).collect();
        buffer.copy_in_rows(rows(10, 30, 4), &block).unwrap();
        let mut all = [0; 100];
        buffer.copy_out(0, &mut all).unwrap();
        let mut expect = [0; 100];
        expect[10..14].copy_from_slice(&block[..4]);
        expect[40..44].copy_from_slice(&block[4..8]);
        expect[70..74].copy_from_slice(&block[8..]);
        assert_eq!(all, expect);
        let mut found = [0; 12];
        buffer.copy_out_rows(rows(10, 30, 4), &mut found).unwrap();
        assert_eq!(found[..], block);
    }

    #[test]
    fn what_does_not_fit_is_refused_whole() {
        let buffer = Buffer::memfd("rows", 100).unwrap();
        let block = [7; 12];
        buffer.copy_in_rows(rows(88, 4, 4), &block).unwrap();
        buffer.copy_in_rows(rows(0, 4, 4), &[]).unwrap();
        let mut before = [0; 100];
        buffer.copy_out(0, &mut before).unwrap();
        for odd in [
            rows(89, 4, 4),
            rows(0, 50, 4),
            rows(0, 3, 4),
            rows(0, 8, 5),
            rows(0, 8, 0),
            rows(0, u64::MAX, 4),
            rows(u64::MAX, 4, 4),
        ] {
            assert!(buffer.copy_in_rows(odd, &block).is_err(), "{odd:?}");
            assert!(buffer.copy_out_rows(odd, &mut [0; 12]).is_err(), "{odd:?}");
        }
        let mut after = [0; 100];
        buffer.copy_out(0, &mut after).unwrap();
        assert_eq!(before, after);
    }
}
