//! Where the bytes of a disk are, for whoever reads and writes them.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use poll_engine::ring::chain::Slices;

use super::formatted::errand::{Errand, Inbox};
use super::write_log::WriteLog;
use crate::disk::Access;

/// Where a stretch of a disk is. Each has the number of bytes, from the first that was asked for, that are so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file, and may be read or written there.
    File {
        /// The file.
        fd: RawFd,
        /// Where in it.
        offset: u64,
        /// How much of it.
        len: u32,
    },
    /// Nowhere: it reads as zeros.
    Zeros(u32),
    /// Where only a worker gets at it.
    Elsewhere(u32),
}

/// Where the bytes of a disk are.
pub trait Layout: Send + 'static {
    /// Pages of a bounce buffer; longer requests go through it piece by piece.
    const BOUNCE_PAGES: usize;
    /// Whether some places are for workers only.
    const HAS_WORKERS: bool;
    /// Whether the files have other bytes than the disk: what is read and written passes through bounce buffers then, and
    /// through the functions below.
    const CIPHERS: bool = false;

    /// Where `offset` is, and as much of the `len` bytes from there on as is together with it; never nothing.
    fn place(&self, access: Access, offset: u64, len: u32) -> Place;

    /// Whether all files are memory: what is in them is read and written at once. Never with a write log.
    fn is_in_memory(&self) -> bool {
        false
    }

    /// The files that a flush has to make durable, one after the other.
    fn flush_fd(&self, index: usize) -> Option<RawFd>;

    /// What will be durable when all files have been synced that are synced from here on.
    fn flush_mark(&self) -> u64 {
        0
    }

    /// What was so marked is durable.
    fn flushed(&self, _mark: u64) {}

    /// Whether a durable write needs a flush to be found again.
    fn is_behind(&self) -> bool {
        false
    }

    /// Has a worker run an errand; the answer comes to the inbox.
    fn send(&self, errand: Errand) {
        unreachable!("an errand without workers: {errand:?}")
    }

    /// Where answers come to.
    fn inbox(&self) -> Option<&Inbox> {
        None
    }

    /// Where all that changes its files is to be written down.
    #[inline]
    fn write_log(&self) -> Option<&WriteLog> {
        None
    }

    /// What a file is to have for `data`, which is written at `offset`.
    fn encipher(&mut self, _offset: u64, _data: Slices<'_>, _into: &mut [u8]) {
        unreachable!("no cipher")
    }

    /// What a file is to have for zeros.
    fn encipher_zeros(&mut self, _offset: u64, _into: &mut [u8]) {
        unreachable!("no cipher")
    }

    /// What a file has at `offset` as `data`; `from` is changed by that.
    fn decipher(&mut self, _offset: u64, _from: &mut [u8], _data: Slices<'_>) {
        unreachable!("no cipher")
    }
}

/// As they are in a file.
pub struct Plain(pub File);

impl Layout for Plain {
    const BOUNCE_PAGES: usize = 32;
    const HAS_WORKERS: bool = false;

    #[inline]
    fn place(&self, _: Access, offset: u64, len: u32) -> Place {
        // The plain descriptor, not a registered file: see `Uring`.
        Place::File { fd: self.0.as_raw_fd(), offset, len }
    }

    fn flush_fd(&self, index: usize) -> Option<RawFd> {
        (index == 0).then(|| self.0.as_raw_fd())
    }
}

/// A layout with all that changes its files written down.
pub struct Logged<L>(pub L, pub Arc<WriteLog>);

impl<L: Layout> Layout for Logged<L> {
    const BOUNCE_PAGES: usize = L::BOUNCE_PAGES;
    const HAS_WORKERS: bool = L::HAS_WORKERS;
    const CIPHERS: bool = L::CIPHERS;

    fn place(&self, access: Access, offset: u64, len: u32) -> Place {
        self.0.place(access, offset, len)
    }

    fn flush_fd(&self, index: usize) -> Option<RawFd> {
        self.0.flush_fd(index)
    }

    fn flush_mark(&self) -> u64 {
        self.0.flush_mark()
    }

    fn flushed(&self, mark: u64) {
        self.0.flushed(mark);
    }

    fn is_behind(&self) -> bool {
        self.0.is_behind()
    }

    fn send(&self, errand: Errand) {
        self.0.send(errand);
    }

    fn inbox(&self) -> Option<&Inbox> {
        self.0.inbox()
    }

    fn write_log(&self) -> Option<&WriteLog> {
        Some(&self.1)
    }

    fn encipher(&mut self, offset: u64, data: Slices<'_>, into: &mut [u8]) {
        self.0.encipher(offset, data, into);
    }

    fn encipher_zeros(&mut self, offset: u64, into: &mut [u8]) {
        self.0.encipher_zeros(offset, into);
    }

    fn decipher(&mut self, offset: u64, from: &mut [u8], data: Slices<'_>) {
        self.0.decipher(offset, from, data);
    }
}
