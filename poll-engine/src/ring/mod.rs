//! Virtqueues: a [`RingConfig`] is what the front end said, [`Ring`] is a running queue. [`Ring::activate`] checks
//! everything once; after that no guest value is trusted and none can cause more than an error.

pub mod chain;
pub mod driver;
pub mod inflight;
pub mod layout;
pub mod packed;
pub mod split;
mod table;

pub use vring::layout::{MAX_RING_SIZE, RingFormat};

use serde::{Deserialize, Serialize};

use crate::device::features;
use crate::memory::iotlb::{Access, Miss, each_missing};
use crate::memory::log::QueueLog;
use crate::memory::map::{Locator, MemoryError, MemoryMap};
use crate::memory::slice::RawSlice;
use chain::Chain;
use inflight::QueueRegion;
use layout::{DESC_F_INDIRECT, DESC_F_WRITE, DESC_SIZE, Desc, PackedLayout, SplitLayout};
use packed::PackedRing;
use split::SplitRing;

/// How [`RingFormat`], which is of a crate without serde, is written.
#[derive(Serialize, Deserialize)]
#[serde(remote = "RingFormat")]
enum RingFormatName {
    Split,
    Packed,
}

/// A virtqueue as the transport describes it, nothing checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools)] // feature bits, each of its own meaning
pub struct RingConfig {
    /// Number of descriptors.
    pub size: u32,
    /// Address of the descriptor table, in the transport's address space.
    pub desc_addr: u64,
    /// Address of the available ring (driver area).
    pub avail_addr: u64,
    /// Address of the used ring (device area).
    pub used_addr: u64,
    /// How it lies in memory.
    #[serde(with = "RingFormatName")]
    pub format: RingFormat,
    /// Where to begin, as vhost-user counts. Split: the available index. Packed: bits 0 to 14 are the next available
    /// descriptor, bit 15 its wrap counter, bits 16 to 31 the same for used descriptors.
    pub base: u32,
    /// `VIRTIO_F_EVENT_IDX` is negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` is negotiated.
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER` is negotiated: the device uses chains in the order in which they were made available.
    pub in_order: bool,
    /// `VIRTIO_F_ACCESS_PLATFORM` is negotiated: ring addresses may be I/O virtual ones.
    pub access_platform: bool,
}

impl RingConfig {
    /// A new ring of `size` descriptors with its parts (descriptors, driver area, device area) at these addresses, as
    /// the negotiated `features` have it.
    pub fn new(size: u32, [desc_addr, avail_addr, used_addr]: [u64; 3], features: u64) -> RingConfig {
        let has = |bit: u64| features & bit != 0;
        let format = if has(features::RING_PACKED) { RingFormat::Packed } else { RingFormat::Split };
        RingConfig {
            size,
            desc_addr,
            avail_addr,
            used_addr,
            format,
            base: format.initial_base(),
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC),
            in_order: has(features::IN_ORDER),
            access_platform: has(features::ACCESS_PLATFORM),
        }
    }

    /// The ring size, if the format allows it.
    pub fn checked_size(&self) -> Result<u16, RingError> {
        if self.format.allows_size(self.size) {
            Ok(self.size as u16)
        } else {
            Err(RingError::BadSize(self.size))
        }
    }

    /// Address and bytes of the three parts, and what the device does there (virtio 1.3, 2.7 and 2.8).
    pub fn parts(&self) -> [(u64, u64, Access); 3] {
        let n = u64::from(self.size);
        match self.format {
            RingFormat::Split => [
                (self.desc_addr, 16 * n, Access::READ),
                (self.avail_addr, 6 + 2 * n, Access::READ),
                (self.used_addr, 6 + 8 * n, Access::BOTH),
            ],
            RingFormat::Packed => [
                (self.desc_addr, 16 * n, Access::BOTH),
                (self.avail_addr, 4, Access::READ),
                (self.used_addr, 4, Access::BOTH),
            ],
        }
    }

    /// Calls `found` for each page of the ring that `map` does not translate.
    pub fn each_missing(&self, map: &MemoryMap, mut found: impl FnMut(Miss)) {
        for (addr, len, access) in self.parts() {
            each_missing(map, addr, len, access, |miss| {
                found(miss);
                true
            });
        }
    }

    /// Whether some of the ring is between `first` and `last`, in the transport's address space.
    pub fn touches(&self, first: u64, last: u64) -> bool {
        self.parts().iter().any(|&(addr, len, _)| addr <= last && addr.saturating_add(len - 1) >= first)
    }
}

/// Descriptors that a survey for missing translations looks at.
const MAX_SURVEYED: u32 = 1024;

/// Looks for what a descriptor, or the table it points to, names and `map` does not translate; false when `found` wants
/// no more. `decode` is how the format has the descriptors in a table.
#[cold]
fn survey_desc(
    map: &MemoryMap,
    desc: &Desc,
    decode: fn([u64; 2]) -> Desc,
    left: &mut u32,
    found: &mut impl FnMut(Miss) -> bool,
) -> bool {
    let mut more = true;
    let mut complete = true;
    let access = if desc.flags & DESC_F_WRITE == 0 { Access::READ } else { Access::WRITE };
    each_missing(map, desc.addr, desc.len.into(), access, |miss| {
        complete = false;
        more = found(miss);
        more
    });
    if desc.flags & DESC_F_INDIRECT == 0 || !complete {
        return more;
    }
    let mut at = 0;
    while more && *left > 0 && desc.len - at >= DESC_SIZE {
        *left -= 1;
        // One that crosses into another page is found when its turn comes.
        let pair = map.slice(desc.addr.wrapping_add(at.into()), DESC_SIZE).and_then(|s| s.read_pair_once());
        if let Some(pair) = pair {
            let buffer = decode(pair);
            let access = if buffer.flags & DESC_F_WRITE == 0 { Access::READ } else { Access::WRITE };
            each_missing(map, buffer.addr, buffer.len.into(), access, |miss| {
                more = found(miss);
                more
            });
        }
        at += DESC_SIZE;
    }
    more
}

/// What is wrong with a ring or a chain: the guest's fault (or the front end's), never ours. It stops the queue.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The size is none that the format allows.
    #[error("ring size {0} is none up to {MAX_RING_SIZE} that the ring format allows")]
    BadSize(u32),
    /// A base that no ring of this format and size has.
    #[error("ring base {0:#x} is none of a ring of this format and size")]
    BadBase(u32),
    /// A ring part is not aligned as virtio 1.3, 2.7 demands.
    #[error("ring address {0:#x} is misaligned")]
    Misaligned(u64),
    /// A ring part, a buffer or an indirect table is outside guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The available index is further ahead than the ring is long.
    #[error("available index jumped by {0}, more than the ring holds")]
    AvailJump(u16),
    /// More chains are in flight than the ring has descriptors.
    #[error("more chains made available than the ring has descriptors")]
    TooManyInFlight,
    /// A head or `next` index beyond the table.
    #[error("descriptor index {index} is outside a table of {size}")]
    BadIndex {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u32,
    },
    /// More descriptors in a chain than the queue size allows: a loop, or a driver that ignores 2.7.5.3.1.
    #[error("descriptor chain loops or is longer than {0}")]
    TooLong(u32),
    /// Indirect where it must not be: not negotiated, nested, or with `NEXT` (2.7.5.3.1).
    #[error("indirect descriptor where the spec forbids one")]
    BadIndirect,
    /// An indirect table that is empty, no multiple of 16 bytes, or longer than its indices reach.
    #[error("indirect table of {0} bytes")]
    BadTable(u32),
    /// A descriptor with no bytes.
    #[error("descriptor of zero length")]
    ZeroLength,
    /// A device-readable descriptor after a device-writable one (2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    BadOrder,
    /// The record of requests in flight is none of this ring.
    #[error("the in-flight region does not fit the ring: {0}")]
    BadInflight(&'static str),
    /// A chain of more than 2^32 bytes (2.7.5.2).
    #[error("descriptor chain of 4 GiB or more")]
    TooManyBytes,
}

/// A taken chain. It must be given back through [`Ring::complete`], exactly once: dropping it loses a request, and
/// that is a bug of ours, so it shouts.
#[derive(Debug)]
#[must_use = "a taken chain must be completed"]
pub struct Token(Used);

/// What a used element says of a chain, but for the bytes written. In two words, which are written and read whole: a read
/// of several writes at once would wait until all the writes before them, guest memory's too, have reached the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// `id`, `len`, `writable`.
    about: u64,
    /// `entry`, `again`.
    record: u32,
}

impl Used {
    /// No chain.
    pub(crate) const NONE: Used = Used { about: 0, record: 0 };

    #[inline]
    fn new(id: u16, len: u16, writable: u32) -> Used {
        let about = u64::from(id) | u64::from(len) << 16 | u64::from(writable) << 32;
        Used { about, record: 0 }
    }

    /// The head's index, or the buffer ID of a packed ring.
    #[inline]
    fn id(self) -> u16 {
        self.about as u16
    }

    /// Descriptors in a packed ring; 1 in a split one.
    #[inline]
    fn len(self) -> u16 {
        (self.about >> 16) as u16
    }

    /// Bytes that could be written.
    #[inline]
    pub(crate) fn writable(self) -> u32 {
        (self.about >> 32) as u32
    }

    /// Where a packed ring has recorded it.
    #[inline]
    fn entry(self) -> u16 {
        self.record as u16
    }

    /// An earlier back end had taken it.
    #[inline]
    fn again(self) -> bool {
        self.record >> 16 != 0
    }
}

impl Token {
    pub(crate) fn new(id: u16, len: u16, writable: u32) -> Token {
        Token(Used::new(id, len, writable))
    }

    /// For [`probes`](crate::probes): the chain's id in the low 16 bits.
    #[inline]
    pub(crate) fn about(&self) -> u64 {
        self.0.about
    }

    #[inline]
    fn recorded(mut self, entry: u16) -> Token {
        self.0.record |= u32::from(entry);
        self
    }

    #[inline]
    fn again(mut self) -> Token {
        self.0.record |= 1 << 16;
        self
    }

    /// Names the chain while it is in flight: the head's index in a split ring, the buffer ID in a packed one.
    #[inline]
    pub fn id(&self) -> u16 {
        self.0.id()
    }

    /// What it stands for, which the caller owes to the ring from now on.
    #[inline]
    pub(crate) fn redeem(self) -> Used {
        let used = self.0;
        std::mem::forget(self);
        used
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "chain {} was dropped without being completed", self.id());
    }
}

/// What of a chain's first buffer to fetch ahead, before the chain is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// So many bytes.
    pub bytes: u32,
    /// To be written: by the device, or beside what it reads.
    pub write: bool,
}

impl Ahead {
    /// The header of a request: drivers have what a device answers beside what it is asked.
    pub const HEADER: Ahead = Ahead { bytes: DESC_SIZE, write: true };
    /// Nothing of the buffers, only what is needed to take the chains.
    pub const RING: Ahead = Ahead { bytes: 0, write: false };

    #[inline]
    fn fetch(self, map: &MemoryMap, addr: u64, len: u32) {
        // The guest's values are used as hints only; `take` reads and checks them again.
        if self.bytes == DESC_SIZE && self.write {
            // A header is in one line.
            if let Some(first) = map.slice(addr, DESC_SIZE) {
                first.prefetch_write();
            }
        } else if let Some(first) = map.slice(addr, self.bytes.min(len)) {
            first.prefetch_lines(self.write);
        }
    }
}

/// A running virtqueue, device side. The one place where ring formats differ.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a queue has one, and is in a box
pub enum Ring {
    /// Virtio 1.3, 2.7.
    Split(SplitRing),
    /// Virtio 1.3, 2.8.
    Packed(PackedRing),
}

macro_rules! each_format {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Ring {
    /// Turns a configuration into a running ring, checking all of it.
    pub fn activate(config: &RingConfig, map: &MemoryMap) -> Result<Ring, RingError> {
        Ok(match config.format {
            RingFormat::Split => Ring::Split(SplitRing::new(SplitLayout::new(config, map)?, config)?),
            RingFormat::Packed => Ring::Packed(PackedRing::new(PackedLayout::new(config, map)?, config)?),
        })
    }

    /// Keeps the record of what is in flight in `region`, before the first chain is taken. What the region says was in
    /// flight when the last back end ended is the first to be [available](Self::available), in the order it had been
    /// taken, and the ring goes on behind that rather than at [`RingConfig::base`]: a front end whose back end has died
    /// knows only where the used ring ends.
    pub fn recover(mut self, region: QueueRegion) -> Result<Ring, RingError> {
        let ring = &mut self;
        if each_format!(ring, r => r.recover(region)?) {
            // The interrupt of the last back end may have died with it.
            ring.owe_interrupt();
            // What the driver is told of notifications follows the next chain to be taken.
            ring.enable_notification();
            ring.disable_notification();
        }
        Ok(self)
    }

    /// Chains in flight that an earlier back end had taken and that are to be taken again.
    #[inline]
    pub fn resubmits(&self) -> u16 {
        each_format!(self, r => r.kept.resubmits())
    }

    /// Makes what is to be taken again available again, as if no back end had taken it; nothing may be in flight. False
    /// where that cannot be said to the driver: in a split ring, when chains made available later have been used before.
    pub fn return_resubmits(&mut self) -> bool {
        debug_assert_eq!(self.in_flight(), 0);
        each_format!(self, r => r.return_resubmits())
    }

    /// Whether the front end has taken the memory of the in-flight record away.
    pub fn has_faulted(&self) -> bool {
        each_format!(self, r => r.kept.has_faulted())
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        each_format!(self, r => r.size())
    }

    /// Where the device would go on: what `GET_VRING_BASE` answers once nothing is in flight ([`RingConfig::base`]).
    pub fn base(&self) -> u32 {
        each_format!(self, r => r.base())
    }

    /// Chains taken and not yet completed.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        each_format!(self, r => r.in_flight())
    }

    /// How many chains are ready to be taken; of a packed ring not all need be counted.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        match self {
            Ring::Split(r) => r.available(),
            Ring::Packed(r) => Ok(r.available()),
        }
    }

    /// Looks for what available chains name and `map` does not translate, until `found` returns false.
    pub fn survey(&self, map: &MemoryMap, found: &mut impl FnMut(Miss) -> bool) {
        each_format!(self, r => r.survey(map, found));
    }

    /// Fetches ahead what the next `count` chains need.
    #[inline]
    pub fn prefetch(&mut self, count: u16, ahead: Ahead, map: &MemoryMap) {
        each_format!(self, r => r.prefetch(count, ahead, map));
    }

    /// Takes the next chain, which [`available`](Self::available) has counted: reads it once and checks it whole.
    #[inline]
    pub fn take(&mut self, map: &MemoryMap, chain: &mut Chain) -> Result<Token, RingError> {
        each_format!(self, r => r.take(map, chain))
    }

    /// Takes the next chains, which [`available`](Self::available) has counted, as long as each is one buffer in one place:
    /// the packets of most drivers, and what they receive into. Into `slices` and `used`, as many as there is room for; how
    /// many. Nothing has happened with the next one: [`take`](Self::take) says what it is.
    #[inline(always)] // once a burst
    pub(crate) fn take_singles(
        &mut self,
        at: &mut Locator<'_>,
        ahead: Ahead,
        slices: &mut [RawSlice],
        used: &mut [Used],
    ) -> usize {
        each_format!(self, r => r.take_singles(at, ahead, slices, used))
    }

    /// Gives chains back in this order, `written(number)` bytes written to each, as [`complete`](Self::complete) does.
    #[inline(always)] // once a burst
    pub(crate) fn complete_all(&mut self, used: &[Used], written: impl Fn(usize) -> u32) {
        match self {
            Ring::Split(r) => r.complete_all(used, written),
            Ring::Packed(r) => {
                used.iter().enumerate().for_each(|(at, &used)| r.complete(used, written(at)));
            }
        }
    }

    /// As [`untake`](Self::untake).
    #[inline]
    pub(crate) fn untake_used(&mut self, used: Used) {
        each_format!(self, r => r.untake(used));
    }

    /// Gives a chain back with the number of bytes written to it; seen by the driver after [`publish`](Self::publish).
    #[inline]
    pub fn complete(&mut self, token: Token, written: u32) {
        each_format!(self, r => r.complete(token.redeem(), written));
    }

    /// Puts the chain that was taken last back to be taken again, untouched. Several go back in reverse order; none that
    /// was taken after one of them may have been completed.
    #[inline]
    pub fn untake(&mut self, token: Token) {
        self.untake_used(token.redeem());
    }

    /// Shows all completed chains to the driver; false when there was none. The caller owes a look at
    /// [`wants_interrupt`](Self::wants_interrupt).
    #[inline]
    pub fn publish(&mut self) -> bool {
        each_format!(self, r => r.publish())
    }

    /// Whether the driver wants an interrupt for what has been published since this was last asked; `None` when that
    /// is nothing. It costs a full memory barrier, which several publishes may share.
    #[inline]
    pub fn wants_interrupt(&mut self) -> Option<bool> {
        each_format!(self, r => r.wants_interrupt())
    }

    /// An earlier interrupt may have been lost: [`wants_interrupt`](Self::wants_interrupt) says yes next time.
    pub fn owe_interrupt(&mut self) {
        each_format!(self, r => r.owe_interrupt());
    }

    /// Asks the driver for notifications; true when chains came meanwhile and must be handled before sleeping.
    pub fn enable_notification(&mut self) -> bool {
        each_format!(self, r => r.enable_notification())
    }

    /// Tells the driver that no notification is needed.
    pub fn disable_notification(&mut self) {
        each_format!(self, r => r.disable_notification());
    }

    /// Tells a log what is written to the ring from now on; what had been written outside of entries is marked at once.
    pub fn set_log(&mut self, log: Option<&QueueLog>) {
        match self {
            Ring::Split(r) => r.set_log(log.and_then(QueueLog::used_part)),
            Ring::Packed(r) => r.set_log(log),
        }
    }

    /// Moves the ring to where `config` lies in a new memory map, keeping all indices.
    pub fn relocate(&mut self, config: &RingConfig, map: &MemoryMap) -> Result<(), RingError> {
        match self {
            Ring::Split(r) => r.relocate(SplitLayout::new(config, map)?),
            Ring::Packed(r) => r.relocate(PackedLayout::new(config, map)?),
        }
        Ok(())
    }
}
