//! Which requests a job makes: direction, place and size of one after another.

use vhost_blk::request::{T_FLUSH, T_IN, T_OUT};

use crate::spec::Spec;

/// Numbers that are the same for the same seed (xorshift).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Seeds near each other give sequences that have nothing in common.
    pub fn new(seed: u64) -> Random {
        let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        // Zero would stay zero.
        Random((z ^ z >> 31) | 1 << 63)
    }

    /// The next number.
    #[inline]
    #[allow(clippy::should_implement_trait)] // it has no end
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A random order of `0..n`, computed instead of kept.
#[derive(Debug)]
struct Order {
    n: u64,
    next: u64,
    bits: u32,
    key: u64,
}

impl Order {
    fn new(n: u64, key: u64) -> Order {
        Order { n, next: 0, bits: (64 - (n - 1).leading_zeros()).max(2), key }
    }

    #[inline]
    fn next(&mut self, random: &mut Random) -> u64 {
        if self.next == self.n {
            (self.next, self.key) = (0, random.next());
        }
        let mut at = self.next;
        self.next += 1;
        // Each step is one to one on `bits` bits, so walking on from what is too large comes back into range, and no
        // number comes twice.
        loop {
            at = self.mix(at);
            if at < self.n {
                return at;
            }
        }
    }

    #[inline]
    fn mix(&self, mut x: u64) -> u64 {
        let (mask, half) = ((1u64 << self.bits) - 1, self.bits.div_ceil(2));
        x = x.wrapping_add(self.key) & mask;
        x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask;
        x ^= x >> half;
        x = x.wrapping_mul(self.key | 1) & mask;
        x ^= x >> half;
        x.wrapping_mul(0xbf58_476d_1ce4_e5b9 | 1) & mask
    }
}

/// The part of the disk that a job works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl Region {
    /// That of job `index` of its section, on a disk of `disk` bytes.
    pub fn of(spec: &Spec, index: u64, disk: u64) -> Result<Region, String> {
        let start = spec.offset.of(disk).saturating_add(spec.offset_increment.of(disk).saturating_mul(index));
        let rest = disk.saturating_sub(start);
        let len = spec.size.map_or(rest, |size| size.of(disk));
        if len > rest {
            return Err(format!("offset {start} and size {len} reach past the disk's {disk} bytes"));
        }
        if len < u64::from(spec.largest()) {
            return Err(format!("no request of {} bytes fits into {len}", spec.largest()));
        }
        Ok(Region { start, len })
    }

    /// Whether they have a byte in common.
    pub fn overlaps(&self, other: &Region) -> bool {
        self.start < other.start + other.len && other.start < self.start + self.len
    }
}

/// What a request is for, by its number in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// From the disk.
    Read = T_IN,
    /// To the disk.
    Write = T_OUT,
    /// Makes durable what was written.
    Flush = T_FLUSH,
}

impl Op {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
        }
    }
}

/// A request to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// What for.
    pub op: Op,
}

impl Request {
    /// One that has no data.
    pub const FLUSH: Request = Request { offset: 0, len: 0, op: Op::Flush };

    /// Whether they have a byte in common.
    pub fn overlaps(&self, other: &Request) -> bool {
        self.offset < other.offset + u64::from(other.len) && other.offset < self.offset + u64::from(self.len)
    }
}

/// Makes up one request after another, for ever.
#[derive(Debug)]
pub struct Requests {
    sequential: bool,
    /// Percentage of reads.
    reads: u64,
    sizes: [crate::units::Sizes; 2],
    region: Region,
    /// Offsets are multiples of it.
    align: u64,
    random: Random,
    /// Where sequential reads and writes go on.
    at: [u64; 2],
    order: Option<Order>,
    /// A flush is due behind so many writes, and how many there were since the last.
    fsync: u64,
    unflushed: u64,
}

impl Requests {
    /// Those of job `index` of its section.
    pub fn new(spec: &Spec, index: u64, region: Region) -> Requests {
        let mut random = Random::new(spec.randseed.wrapping_add(index));
        let sides: &[usize] = match (spec.rw.reads(), spec.rw.writes()) {
            (true, false) => &[0],
            (false, true) => &[1],
            _ => &[0, 1],
        };
        let align = sides.iter().map(|&s| u64::from(spec.sizes[s].range().0)).min().unwrap_or(512);
        let same = sides.iter().all(|&s| spec.sizes[s].only().map(u64::from) == Some(align));
        let sequential = !spec.rw.random();
        // Blocks of different sizes have no order that meets each once.
        let order = (!sequential && !spec.norandommap && same)
            .then(|| Order::new((region.len / align).max(1), random.next()));
        let start = if spec.spread { index * (region.len / align / 64) * align } else { 0 } % region.len;
        Requests {
            sequential,
            reads: match (spec.rw.reads(), spec.rw.writes()) {
                (true, false) => 100,
                (false, true) => 0,
                _ => u64::from(spec.rwmixread),
            },
            sizes: spec.sizes.clone(),
            region,
            align,
            random,
            at: [start; 2],
            order,
            fsync: spec.fsync.unwrap_or(u64::MAX),
            unflushed: 0,
        }
    }

    /// Whether the next one is to be a flush.
    #[inline]
    pub fn flush_is_due(&self) -> bool {
        self.unflushed >= self.fsync
    }

    /// The flush.
    pub fn flush(&mut self) -> Request {
        self.unflushed = 0;
        Request::FLUSH
    }

    /// The next one that has data.
    #[inline]
    pub fn next(&mut self) -> Request {
        let random = self.random.next();
        // The high bits: the low ones choose a place below.
        let write = match self.reads {
            100 => false,
            0 => true,
            reads => (random >> 40) % 100 >= reads,
        };
        let len = self.sizes[usize::from(write)].pick(random);
        let room = self.region.len - u64::from(len);
        let offset = if self.sequential {
            let at = &mut self.at[usize::from(write)];
            let offset = if *at > room { 0 } else { *at };
            *at = offset + u64::from(len);
            offset
        } else if let Some(order) = &mut self.order {
            order.next(&mut self.random) * self.align
        } else {
            let places = room / self.align + 1;
            ((u128::from(self.random.next()) * u128::from(places)) >> 64) as u64 * self.align
        };
        self.unflushed += u64::from(write);
        let op = if write { Op::Write } else { Op::Read };
        Request { offset: self.region.start + offset, len, op }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Pattern;
    use crate::units::{Amount, Sizes};

    fn requests(spec: &Spec, len: u64) -> Requests {
        Requests::new(spec, 0, Region { start: 1 << 20, len })
    }

    #[test]
    fn a_random_order_meets_every_block_once() {
        for n in [1, 2, 3, 100, 1000, 4096] {
            let spec = Spec { rw: Pattern::Randread, ..Spec::default() };
            let mut requests = requests(&spec, n * 4096);
            let mut passes = Vec::new();
            for _ in 0..2 {
                let pass: Vec<_> = (0..n).map(|_| requests.next().offset).collect();
                let mut sorted = pass.clone();
                sorted.sort_unstable();
                assert!(sorted.iter().copied().eq((0..n).map(|i| (1 << 20) + i * 4096)), "{n}");
                passes.push(pass);
            }
            assert!(n < 100 || passes[0] != passes[1]);
        }
    }

    #[test]
    fn sequential_requests_start_over_at_the_end() {
        let spec = Spec { rw: Pattern::Write, ..Spec::default() };
        let mut requests = requests(&spec, 3 * 4096 + 512);
        let offsets: Vec<_> = (0..5).map(|_| requests.next().offset - (1 << 20)).collect();
        assert_eq!(offsets, [0, 4096, 8192, 0, 4096]);
    }

    #[test]
    fn mixes_keep_to_their_shares_and_to_their_part() {
        let mut spec = Spec { rw: Pattern::Randrw, rwmixread: 70, ..Spec::default() };
        Sizes::set_splits(&mut spec.sizes, "4k/50:64k/50,8k/100").unwrap();
        let mut requests = requests(&spec, 1 << 20);
        let all: Vec<_> = (0..10_000).map(|_| requests.next()).collect();
        let reads = all.iter().filter(|r| r.op == Op::Read).count();
        let large = all.iter().filter(|r| r.len == 65536).count();
        assert!((6800..7200).contains(&reads) && (3300..3700).contains(&large), "{reads} {large}");
        assert!(all.iter().all(|r| r.offset >= 1 << 20 && r.offset + u64::from(r.len) <= 2 << 20));
        assert!(all.iter().all(|r| r.op == Op::Read || r.len == 8192));
        // The same seed gives the same requests, another one others.
        let again = |seed| {
            let spec = Spec { randseed: seed, ..spec.clone() };
            let mut requests = self::requests(&spec, 1 << 20);
            (0..100).map(|_| requests.next()).collect::<Vec<_>>()
        };
        assert!(again(0) == all[..100] && again(1) != all[..100]);
    }

    #[test]
    fn flushes_are_due_behind_so_many_writes() {
        let spec = Spec { rw: Pattern::Randrw, fsync: Some(3), ..Spec::default() };
        let mut requests = requests(&spec, 1 << 20);
        let (mut writes, mut flushes) = (0, 0);
        for _ in 0..1000 {
            writes += u64::from(requests.next().op == Op::Write);
            if requests.flush_is_due() {
                flushes += 1;
                assert_eq!((writes, requests.flush()), (3 * flushes, Request::FLUSH));
            }
        }
        assert!(!requests.flush_is_due() && flushes > 100 && writes / 3 == flushes);
        // It is in nobody's way.
        let all = Request { offset: 0, len: 1 << 20, op: Op::Write };
        assert!(!all.overlaps(&Request::FLUSH) && !Request::FLUSH.overlaps(&all));
    }

    #[test]
    fn parts_lie_on_the_disk() {
        let spec = Spec {
            offset: Amount::Percent(50),
            offset_increment: Amount::Bytes(8192),
            size: Some(Amount::Bytes(8192)),
            ..Spec::default()
        };
        assert_eq!(Region::of(&spec, 1, 1 << 20), Ok(Region { start: (1 << 19) + 8192, len: 8192 }));
        assert!(Region::of(&spec, 64, 1 << 20).is_err());
        assert!(Region::of(&Spec::default(), 0, 512).is_err());
    }
}
