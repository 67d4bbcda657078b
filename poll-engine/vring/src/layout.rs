//! What both ring formats share, and the split ring in memory: offsets, sizes and atomic access, for both sides (virtio 1.3, 2.7).
//!
//! Every index is masked to the ring size, so no accessor can leave the ring, whatever the other side wrote.
#![allow(unsafe_code)] // rings are shared with the other side and live at raw addresses

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use crate::packed::EVENT_SIZE;

/// `VIRTQ_DESC_F_NEXT`: the chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: device-writable, otherwise device-readable.
pub const DESC_F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
pub const USED_F_NO_NOTIFY: u16 = 1;

/// Largest ring (virtio 1.3, 2.7: "The maximum Queue Size value is 32768"; 2.8: "up to 2^15 entries each").
pub const MAX_RING_SIZE: u16 = 32768;

/// How a virtqueue lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingFormat {
    /// Virtio 1.3, 2.7.
    #[default]
    Split,
    /// Virtio 1.3, 2.8: `VIRTIO_F_RING_PACKED` is negotiated.
    Packed,
}

impl RingFormat {
    /// The base of a ring that nobody has used, as vhost-user counts.
    pub fn initial_base(self) -> u32 {
        match self {
            RingFormat::Split => 0,
            // 2.8.1: both wrap counters start at 1.
            RingFormat::Packed => 0x8000_8000,
        }
    }

    /// Whether a ring may have `size` descriptors: a power of two (2.7), or any number (2.8), up to [`MAX_RING_SIZE`].
    pub fn allows_size(self, size: u32) -> bool {
        (1..=u32::from(MAX_RING_SIZE)).contains(&size)
            && (self == RingFormat::Packed || size.is_power_of_two())
    }

    /// Bytes of the three parts of a ring of `size` descriptors: descriptors, driver area, device area.
    pub fn bytes(self, size: u16) -> (u64, u64, u64) {
        match self {
            RingFormat::Split => split_bytes(size),
            RingFormat::Packed => (u64::from(DESC_SIZE) * u64::from(size), EVENT_SIZE, EVENT_SIZE),
        }
    }

    /// What the addresses of the parts are multiples of (2.7, 2.8.10.1).
    pub fn alignment(self) -> (usize, usize, usize) {
        match self {
            RingFormat::Split => (16, 2, 4),
            RingFormat::Packed => (16, 4, 4),
        }
    }
}

/// Bytes of one descriptor.
pub const DESC_SIZE: u32 = 16;

/// `struct virtq_desc` (virtio 1.3, 2.7.5), as read once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Desc {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `DESC_F_*`.
    pub flags: u16,
    /// The next descriptor, when `DESC_F_NEXT` is set.
    pub next: u16,
}

impl Desc {
    /// Decodes a descriptor from its two halves, read as little-endian numbers.
    #[inline]
    pub fn from_pair([addr, rest]: [u64; 2]) -> Desc {
        Desc { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// Encodes the descriptor.
    #[inline]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..12].copy_from_slice(&self.len.to_le_bytes());
        b[12..14].copy_from_slice(&self.flags.to_le_bytes());
        b[14..].copy_from_slice(&self.next.to_le_bytes());
        b
    }
}

/// Bytes of the three parts of a split ring of `size` descriptors, with the event fields.
pub fn split_bytes(size: u16) -> (u64, u64, u64) {
    let n = u64::from(size);
    (16 * n, 6 + 2 * n, 6 + 8 * n)
}

/// Whether moving from `old` to `new` passes `event` (virtio 1.3, 2.7.10.1, `vring_need_event`).
#[inline]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Asks the CPU to fetch the cache line at `at`, which may be any address.
#[inline]
pub fn prefetch(at: *const u8) {
    // Targets for kernels have no SSE, and there the intrinsic would be a call.
    #[cfg(all(target_arch = "x86_64", target_feature = "sse"))]
    // SAFETY: a prefetch of any address is only a hint.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", target_feature = "sse")))]
    let _ = at;
}

/// Asks the CPU to fetch the cache line at `at`, which may be any address, to be written: another CPU that has it gives
/// it up in the same transfer, and the write that follows does not hold up those behind it.
#[inline]
pub fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is only a hint; CPUs without this one take it for a no-op.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    prefetch(at);
}

/// The three parts of a split ring, wherever they are mapped.
///
/// It does not keep them mapped: it is neither `Clone` nor `Copy`, so that whoever made it knows how long it lives.
#[derive(Debug)]
pub struct SplitLayout {
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    size: u16,
}

// SAFETY: three addresses, valid for every thread as `at` was promised; access to the rings is atomic, to descriptors
// volatile or by copy, and allows for the other side writing meanwhile.
unsafe impl Send for SplitLayout {}

impl SplitLayout {
    /// The ring of `size` descriptors whose parts are at `desc`, `avail` and `used`.
    ///
    /// # Safety
    /// - The size is a power of two (and so at most 32768).
    /// - The parts are aligned to 16, 2 and 4 bytes and at least as large as [`split_bytes`] says.
    /// - For as long as the layout lives, the parts are valid for reads and writes, by every thread that it is sent
    ///   to, and no reference to their bytes is made but through layouts. The other side may write them at any moment.
    #[inline]
    pub unsafe fn at(desc: NonNull<u8>, avail: NonNull<u8>, used: NonNull<u8>, size: u16) -> SplitLayout {
        debug_assert!(size.is_power_of_two());
        debug_assert!([(desc, 16), (avail, 2), (used, 4)].iter().all(|(p, n)| p.addr().get() % n == 0));
        SplitLayout { desc, avail, used, size }
    }

    /// Number of descriptors, a power of two.
    #[inline]
    pub fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn mask(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    #[inline]
    fn u16_at(part: &NonNull<u8>, offset: usize) -> &AtomicU16 {
        // SAFETY: part is a layout's avail or used, at least 2-byte aligned and valid while the layout lives, as `at`
        // was promised. The offset is even and inside it: a fixed header field, a masked ring slot, or the event field
        // behind the ring. All access is atomic.
        unsafe { part.add(offset).cast::<AtomicU16>().as_ref() }
    }

    #[inline]
    fn desc_slice(&self, index: u16) -> NonNull<u8> {
        // SAFETY: the index is masked, so the descriptor is inside the table.
        unsafe { self.desc.add(16 * self.mask(index)) }
    }

    /// Reads descriptor `index`, each byte once.
    #[inline]
    pub fn desc(&self, index: u16) -> Desc {
        let words = self.desc_slice(index).cast::<u64>();
        // SAFETY: 16 bytes inside the table, 16-byte aligned as `at` was promised; volatile because the other side may
        // write meanwhile.
        let (addr, rest) = unsafe { (words.read_volatile(), words.add(1).read_volatile()) };
        Desc::from_pair([u64::from_le(addr), u64::from_le(rest)])
    }

    /// Writes descriptor `index` (driver side).
    #[inline]
    pub fn set_desc(&self, index: u16, desc: Desc) {
        let rest = u64::from(desc.len) | u64::from(desc.flags) << 32 | u64::from(desc.next) << 48;
        let words = self.desc_slice(index).cast::<u64>();
        // SAFETY: 16 bytes inside the table, 16-byte aligned as `at` was promised. Two stores and no array on the way:
        // a load of what lies in several stores waits for all of them.
        unsafe {
            words.write_volatile(desc.addr.to_le());
            words.add(1).write_volatile(rest.to_le());
        }
    }

    /// Asks the CPU to fetch descriptor `index`.
    #[inline]
    pub fn prefetch_desc(&self, index: u16) {
        prefetch(self.desc_slice(index).as_ptr());
    }

    /// Asks the CPU to fetch descriptor `index`, to be written.
    #[inline]
    pub fn prefetch_desc_write(&self, index: u16) {
        prefetch_write(self.desc_slice(index).as_ptr());
    }

    /// Asks the CPU to fetch the used-ring slot `index`, to be written; not on the line of the used index, which the
    /// driver looks at meanwhile.
    #[inline]
    pub fn prefetch_used(&self, index: u16) {
        if self.mask(index) >= 8 {
            // SAFETY: a masked slot of the used ring.
            prefetch_write(unsafe { self.used.add(4 + 8 * self.mask(index)) }.as_ptr());
        }
    }

    /// `avail->flags`.
    #[inline]
    pub fn avail_flags(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.avail, 0).load(Ordering::Relaxed))
    }

    /// Writes `avail->flags` (driver side).
    #[inline]
    pub fn set_avail_flags(&self, flags: u16) {
        Self::u16_at(&self.avail, 0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// `avail->idx`; what was written before the driver raised it is visible after.
    #[inline]
    pub fn avail_idx(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.avail, 2).load(Ordering::Acquire))
    }

    /// Publishes `avail->idx` (driver side).
    #[inline]
    pub fn set_avail_idx(&self, idx: u16) {
        Self::u16_at(&self.avail, 2).store(idx.to_le(), Ordering::Release);
    }

    /// `avail->ring[slot]`.
    #[inline]
    pub fn avail_ring(&self, slot: u16) -> u16 {
        u16::from_le(Self::u16_at(&self.avail, 4 + 2 * self.mask(slot)).load(Ordering::Relaxed))
    }

    /// Writes `avail->ring[slot]` (driver side).
    #[inline]
    pub fn set_avail_ring(&self, slot: u16, head: u16) {
        Self::u16_at(&self.avail, 4 + 2 * self.mask(slot)).store(head.to_le(), Ordering::Relaxed);
    }

    /// `used_event`, behind the available ring.
    #[inline]
    pub fn used_event(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.avail, 4 + 2 * usize::from(self.size)).load(Ordering::Relaxed))
    }

    /// Writes `used_event` (driver side).
    #[inline]
    pub fn set_used_event(&self, event: u16) {
        Self::u16_at(&self.avail, 4 + 2 * usize::from(self.size)).store(event.to_le(), Ordering::Relaxed);
    }

    /// `used->flags` (driver side).
    #[inline]
    pub fn used_flags(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.used, 0).load(Ordering::Relaxed))
    }

    /// Writes `used->flags`.
    #[inline]
    pub fn set_used_flags(&self, flags: u16) {
        Self::u16_at(&self.used, 0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// `used->idx`; what the device wrote before raising it is visible after.
    #[inline]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.used, 2).load(Ordering::Acquire))
    }

    /// Publishes `used->idx`.
    #[inline]
    pub fn set_used_idx(&self, idx: u16) {
        Self::u16_at(&self.used, 2).store(idx.to_le(), Ordering::Release);
    }

    #[inline]
    fn used_words(&self, slot: u16) -> (&AtomicU32, &AtomicU32) {
        // SAFETY: a masked slot of the used ring, 4-byte aligned as `at` was promised; all access is atomic.
        unsafe {
            let at = self.used.add(4 + 8 * self.mask(slot)).cast::<AtomicU32>();
            (at.as_ref(), at.add(1).as_ref())
        }
    }

    /// Writes `used->ring[slot]`; visible to the driver after [`set_used_idx`](Self::set_used_idx).
    #[inline]
    pub fn set_used_ring(&self, slot: u16, head: u16, len: u32) {
        let (id_word, len_word) = self.used_words(slot);
        id_word.store(u32::from(head).to_le(), Ordering::Relaxed);
        len_word.store(len.to_le(), Ordering::Relaxed);
    }

    /// Reads `used->ring[slot]` as id and length (driver side).
    #[inline]
    pub fn used_ring(&self, slot: u16) -> (u32, u32) {
        let (id_word, len_word) = self.used_words(slot);
        (u32::from_le(id_word.load(Ordering::Relaxed)), u32::from_le(len_word.load(Ordering::Relaxed)))
    }

    /// `avail_event`, behind the used ring (driver side).
    #[inline]
    pub fn avail_event(&self) -> u16 {
        u16::from_le(Self::u16_at(&self.used, 4 + 8 * usize::from(self.size)).load(Ordering::Relaxed))
    }

    /// Writes `avail_event`.
    #[inline]
    pub fn set_avail_event(&self, event: u16) {
        Self::u16_at(&self.used, 4 + 8 * usize::from(self.size)).store(event.to_le(), Ordering::Relaxed);
    }
}
