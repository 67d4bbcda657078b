//! The data of requests, sector by sector, between guest memory and buffers that the kernel reads and writes.

use std::io;

use poll_engine::ring::chain::Slices;

use super::xts::{Direction, KEY, Xts};

/// Bytes that a sector's number counts, whatever the size of sectors (dm-crypt's plain64, without `iv_large_sectors`).
const NUMBERED: u64 = 512;

/// Both directions of a volume's key.
pub struct Cipher {
    encipher: Xts,
    decipher: Xts,
    sector: usize,
    first: u64,
}

impl Cipher {
    /// By a key of [`KEY`] bytes, in sectors of `sector` bytes, where the volume's first 512 bytes have the number `first`.
    pub fn new(key: &[u8], sector: u32, first: u64) -> io::Result<Cipher> {
        let key: &[u8; KEY] = key.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Cipher {
            encipher: Xts::new(key, Direction::Encipher)?,
            decipher: Xts::new(key, Direction::Decipher)?,
            sector: sector as usize,
            first,
        })
    }

    fn number(&self, offset: u64) -> u64 {
        self.first.wrapping_add(offset / NUMBERED)
    }

    /// Enciphers what is to be at `offset` of the volume out of guest memory; `into` has whole sectors, and `data` is no
    /// shorter.
    #[inline]
    pub fn encipher(&mut self, offset: u64, data: Slices<'_>, into: &mut [u8]) {
        let sector = self.sector;
        // Bytes of `into` that are there, of which those of a sector that is not whole are plain.
        let mut at = 0;
        for slice in data {
            let mut used = 0;
            while used < slice.len() && at < into.len() {
                let number = self.number(offset + (at - at % sector) as u64);
                let rest = slice.part(used, sector - at % sector);
                if rest.len() == sector {
                    self.encipher.take(number, &rest, &mut into[at..at + sector]);
                } else {
                    rest.read(&mut into[at..]);
                    if (at + rest.len()).is_multiple_of(sector) {
                        let begin = at - at % sector;
                        self.encipher.in_place(number, &mut into[begin..begin + sector]);
                    }
                }
                at += rest.len();
                used += rest.len();
            }
        }
        // It was checked against the request as it was parsed.
        assert_eq!(at, into.len(), "a request without all of its data");
    }

    /// Enciphers zeros.
    pub fn encipher_zeros(&mut self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        for (i, sector) in into.chunks_exact_mut(self.sector).enumerate() {
            let number = self.first.wrapping_add((offset + (i * self.sector) as u64) / NUMBERED);
            self.encipher.in_place(number, sector);
        }
    }

    /// Deciphers what was at `offset` of the volume into guest memory. Where that has parts of a sector only, `from` has the
    /// whole one meanwhile.
    #[inline]
    pub fn decipher(&mut self, offset: u64, from: &mut [u8], data: Slices<'_>) {
        let sector = self.sector;
        let mut at = 0;
        for slice in data {
            let mut used = 0;
            while used < slice.len() && at < from.len() {
                let inside = at % sector;
                let begin = at - inside;
                let number = self.number(offset + begin as u64);
                let rest = slice.part(used, sector - inside);
                if rest.len() == sector {
                    self.decipher.give(number, &from[begin..begin + sector], &rest);
                } else {
                    if inside == 0 {
                        self.decipher.in_place(number, &mut from[begin..begin + sector]);
                    }
                    rest.write(&from[at..]);
                }
                at += rest.len();
                used += rest.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a power cut may leave of a write of a sector that the storage has as several.
    #[test]
    fn a_torn_sector_is_torn_at_the_same_bytes_when_it_is_deciphered() {
        let key: Vec<u8> = (0..KEY as u8).collect();
        let mut cipher = Cipher::new(&key, 4096, 0).unwrap();
        let number = cipher.number(3 * 4096);
        let (old, new) = ([0x11; 4096], [0x22; 4096]);
        let (mut torn, mut written) = (old, new);
        cipher.encipher.in_place(number, &mut torn);
        cipher.encipher.in_place(number, &mut written);
        torn[512..1024].copy_from_slice(&written[512..1024]);
        torn[4080..].copy_from_slice(&written[4080..]);
        cipher.decipher.in_place(number, &mut torn);
        let mut wanted = old;
        wanted[512..1024].fill(0x22);
        wanted[4080..].fill(0x22);
        assert_eq!(torn, wanted);
    }
}
