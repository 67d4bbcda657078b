//! AES-256 in XTS mode (IEEE 1619), sector by sector, by AWS-LC: with VAES where the CPU has AVX-512 as well, with AES-NI
//! elsewhere.
#![allow(unsafe_code)] // calls of AWS-LC, which is C, on addresses of guest memory

use std::ffi::c_int;
use std::io;
use std::ptr::{NonNull, null, null_mut};

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher, EVP_CipherInit_ex, EVP_aes_256_xts,
};
use nix::sys::mman::{MmapAdvise, madvise, mlock};
use poll_engine::memory::GuestSlice;

/// Bytes of a key: one of AES-256 for the data, and one for the places of the data.
pub const KEY: usize = 64;
/// Bytes of the largest part of a context that depends on the key: two schedules of AES, and pointers to them.
const SCHEDULES: usize = 1024;
const PAGE: usize = 4096;

/// The one direction or the other, with a key.
pub struct Xts(NonNull<EVP_CIPHER_CTX>);

// SAFETY: a context belongs to whoever has it, on any thread; it is used by one at a time, since that takes `&mut`.
unsafe impl Send for Xts {}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Plain to cipher.
    Encipher,
    /// Cipher to plain.
    Decipher,
}

impl Xts {
    /// For this key, whose halves must differ.
    ///
    /// # Errors
    /// No memory, none that may be locked, or a key that is none.
    pub fn new(key: &[u8; KEY], direction: Direction) -> io::Result<Xts> {
        // SAFETY: makes a context, or says that there is no memory.
        let context = NonNull::new(unsafe { EVP_CIPHER_CTX_new() }).ok_or(io::ErrorKind::OutOfMemory)?;
        let xts = Xts(context);
        let at = context.as_ptr();
        let direction = c_int::from(direction == Direction::Encipher);
        // SAFETY: a context that was just made. With a cipher and no key, it gets memory for a key.
        let done = unsafe { EVP_CipherInit_ex(at, EVP_aes_256_xts(), null_mut(), null(), null(), direction) };
        if done != 1 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // SAFETY: it has that memory now.
        let schedules = unsafe { (*at).cipher_data };
        keep_from_disk(schedules.addr())?;
        // SAFETY: a key of this cipher's length; the rest is as it was.
        let done = unsafe { EVP_CipherInit_ex(at, null(), null_mut(), key.as_ptr(), null(), -1) };
        // The one thing that it refuses: IEEE 1619 does not say so, FIPS 140 does (IG C.I).
        if done != 1 {
            return Err(io::Error::other("its two halves are the same"));
        }
        Ok(xts)
    }

    /// One sector, numbered as in dm-crypt's plain64.
    ///
    /// # Safety
    /// `len` bytes can be read at `from` and written at `to`, which is the same place or does not overlap.
    #[inline]
    unsafe fn sector(&mut self, number: u64, from: *const u8, to: *mut u8, len: usize) {
        let tweak = u128::from(number).to_le_bytes();
        let at = self.0.as_ptr();
        // SAFETY: a context with cipher and key, which takes 16 bytes in their place; and as the caller says.
        let done = unsafe {
            EVP_CipherInit_ex(at, null(), null_mut(), null(), tweak.as_ptr(), -1) == 1
                && EVP_Cipher(at, to, from, len) == 1
        };
        // It refuses nothing but sectors of less than a block of AES.
        assert!(done, "a sector of {len} bytes");
    }

    /// One sector where it is.
    #[inline]
    pub fn in_place(&mut self, number: u64, bytes: &mut [u8]) {
        let at = bytes.as_mut_ptr();
        // SAFETY: our bytes, from and to the same place.
        unsafe { self.sector(number, at, at, bytes.len()) };
    }

    /// One sector out of guest memory. What the guest writes there meanwhile may be in it or not, as with any device.
    #[inline]
    pub fn take(&mut self, number: u64, from: &GuestSlice<'_>, to: &mut [u8]) {
        let len = from.len().min(to.len());
        // SAFETY: the slice's bytes are mapped, and guest memory never overlaps our own.
        unsafe { self.sector(number, from.host_addr(), to.as_mut_ptr(), len) };
    }

    /// One sector into guest memory.
    #[inline]
    pub fn give(&mut self, number: u64, from: &[u8], to: &GuestSlice<'_>) {
        let len = to.len().min(from.len());
        // SAFETY: as in `take`, with the direction turned round.
        unsafe { self.sector(number, from.as_ptr(), to.host_addr(), len) };
    }
}

impl Drop for Xts {
    fn drop(&mut self) {
        // SAFETY: ours, and used by nobody any more. It is wiped.
        unsafe { EVP_CIPHER_CTX_free(self.0.as_ptr()) };
    }
}

/// Keeps the pages of what depends on the key from being swapped out, or dumped. They are the allocator's, and stay so when it
/// has them back.
fn keep_from_disk(at: usize) -> io::Result<()> {
    let first = at & !(PAGE - 1);
    let len = (at + SCHEDULES - first).next_multiple_of(PAGE);
    let pages =
        NonNull::new(std::ptr::with_exposed_provenance_mut(first)).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: whole pages around what is allocated; neither call changes what is in them.
    unsafe {
        mlock(pages, len)?;
        madvise(pages, len, MmapAdvise::MADV_DONTDUMP)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    }

    /// IEEE 1619-2007, annex B, vector 10: AES-256, sector 255 of 512 bytes, which are the numbers 0 to 255 twice.
    const VECTOR_10: &str = "\
        1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44680a\
        86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0c5cd4d5f\
        ff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500d\
        c4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f93ec05c52e0493ef\
        31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6dc3966380ad8fecb17b6\
        ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1505eb309326d68378f837459\
        5c849d84f4c333ec4423885143cb47bd71c5edae9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f9\
        0c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac6e333b93eb4aff0479da9a410e4450e0\
        dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed5376441a77ed43851ad7\
        7f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa773dad38014bd2092fa755c824bb5e54c4f36ffd\
        a9fcea70b9c6e693e148c151";
    /// What vector 11 begins with: the same of sector 65535.
    const VECTOR_11: &str = "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11";

    #[test]
    fn the_vectors_of_the_standard() {
        let mut key = [0; KEY];
        key[..32].copy_from_slice(&bytes("2718281828459045235360287471352662497757247093699959574966967627"));
        key[32..].copy_from_slice(&bytes("3141592653589793238462643383279502884197169399375105820974944592"));
        let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        for (number, vector) in [(0xff, VECTOR_10), (0xffff, VECTOR_11)] {
            let mut sector = plain.clone();
            Xts::new(&key, Direction::Encipher).unwrap().in_place(number, &mut sector);
            let wanted = bytes(vector);
            assert_eq!(sector[..wanted.len()], wanted);
            Xts::new(&key, Direction::Decipher).unwrap().in_place(number, &mut sector);
            assert_eq!(sector, plain);
        }
    }

    #[test]
    fn a_key_of_two_equal_halves_is_none() {
        assert!(Xts::new(&[1; KEY], Direction::Encipher).is_err());
    }
}
