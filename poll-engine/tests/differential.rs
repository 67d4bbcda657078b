//! The same ring in the same memory, read by this engine and by the `virtio-queue` crate: what both take to be a chain
//! must be the same chain.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout};
use poll_engine::stats::QueueStats;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use virtio_queue::{Queue as OtherQueue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 64;
const GUEST: u64 = 0x4000_0000;
const BYTES: u64 = 256 << 10;
/// Indirect tables lie from here on, data anywhere behind the ring.
const TABLES: u64 = GUEST + 0x8000;
const TABLE_SLOTS: u64 = 256;
const DATA: u64 = GUEST + 0x10000;

/// One buffer: address, length, writable.
type Part = (u64, u32, bool);

struct Both {
    ram: Ram,
    config: RingConfig,
    other: GuestMemoryMmap,
}

impl Both {
    fn new() -> Both {
        let mut ram = Ram::new(GUEST, BYTES, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, SIZE, features::INDIRECT_DESC).unwrap();
        let file = File::from(ram.fd().try_clone_to_owned().unwrap());
        let range = (GuestAddress(GUEST), BYTES as usize, Some(FileOffset::new(file, 0)));
        let other = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        Both { ram, config, other }
    }

    fn layout(&self) -> SplitLayout {
        SplitLayout::new(&self.config, self.ram.map()).unwrap()
    }

    fn set_table(&self, at: u64, desc: Desc) {
        self.ram.map().slice(at, 16).unwrap().write(&desc.to_bytes());
    }

    /// Our reading of the chain at number `base` of the available ring.
    fn ours(&self, base: u16) -> Option<(u16, Vec<Part>)> {
        let hold = MapHold::new(Arc::clone(self.ram.map()), WaitGroup::new());
        let config = RingConfig { base: base.into(), ..self.config };
        let stats = Arc::new(QueueStats::default());
        let mut queue =
            Queue::new("q".into(), &config, hold, Notifier::default(), Arc::clone(&stats)).unwrap();
        assert!(queue.ready() > 0);
        let Some(request) = queue.take() else {
            assert!(queue.is_broken() && stats.errors_total() == 1);
            return None;
        };
        let host = self.ram.map().regions()[0].host_addr().addr() as u64;
        let chain = queue.chain();
        let readable = chain.readable(0, u32::MAX).map(|s| (s, false));
        let writable = chain.writable(0, u32::MAX).map(|s| (s, true));
        let parts: Vec<Part> = readable
            .chain(writable)
            .map(|(s, w)| (s.host_addr().addr() as u64 - host + GUEST, s.len() as u32, w))
            .collect();
        let sum = |w: bool| parts.iter().filter(|p| p.2 == w).map(|p| p.1).sum::<u32>();
        assert_eq!((chain.readable_len(), chain.writable_len()), (sum(false), sum(true)));
        // The token names the head; the used ring repeats it.
        let used = self.layout().used_idx();
        queue.complete(request, 0);
        Some((self.layout().used_ring(used).0 as u16, parts))
    }

    /// The other reading of it.
    fn theirs(&self, base: u16) -> (u16, Vec<Part>) {
        let mut queue = OtherQueue::new(SIZE).unwrap();
        let guest = |user: u64| user - self.ram.spec().user_addr + GUEST;
        let halves = |user: u64| (Some(guest(user) as u32), Some((guest(user) >> 32) as u32));
        let (low, high) = halves(self.config.desc_addr);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.config.avail_addr);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.config.used_addr);
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        queue.set_next_avail(base);
        assert!(queue.is_valid(&self.other));
        let chain = queue.pop_descriptor_chain(&self.other).unwrap();
        (chain.head_index(), chain.map(|d| (d.addr().0, d.len(), d.is_write_only())).collect())
    }
}

#[derive(Clone, Debug)]
struct ValidChain {
    parts: Vec<Part>,
    /// How many of the parts are in the ring's own table; the others are in an indirect one.
    direct: usize,
    /// The slots of an indirect table, in the order of the chain; the first is 0.
    order: Vec<u16>,
}

fn valid_chain() -> impl Strategy<Value = ValidChain> {
    let part = (DATA..GUEST + BYTES - 0x1000, 1..0x1000u32, any::<bool>());
    let order = Just((1..12u16).collect::<Vec<_>>()).prop_shuffle();
    (prop::collection::vec(part, 1..8), 0..9usize, order).prop_map(|(mut parts, direct, order)| {
        parts.sort_by_key(|p| p.2);
        ValidChain { direct: direct.min(parts.len()), parts, order: [vec![0], order].concat() }
    })
}

fn flags(writable: bool, next: bool) -> u16 {
    (u16::from(writable) * DESC_F_WRITE) | (u16::from(next) * DESC_F_NEXT)
}

impl ValidChain {
    fn write(&self, both: &Both, table: u64, free: &mut Vec<u16>) -> Option<u16> {
        let indirect = self.direct < self.parts.len();
        let slots = self.direct + usize::from(indirect);
        let slots = free.split_off(free.len().checked_sub(slots)?);
        let next = |i: usize| slots.get(i + 1).copied();
        for (i, &(addr, len, writable)) in self.parts[..self.direct].iter().enumerate() {
            let desc = Desc {
                addr,
                len,
                flags: flags(writable, next(i).is_some()),
                next: next(i).unwrap_or(0xffff),
            };
            both.layout().set_desc(slots[i], desc);
        }
        if indirect {
            let rest = &self.parts[self.direct..];
            let desc = Desc { addr: table, len: 16 * 12, flags: DESC_F_INDIRECT, next: 0xffff };
            both.layout().set_desc(slots[self.direct], desc);
            for (i, &(addr, len, writable)) in rest.iter().enumerate() {
                let more = i + 1 < rest.len();
                let desc = Desc { addr, len, flags: flags(writable, more), next: self.order[i + 1] };
                both.set_table(table + 16 * u64::from(self.order[i]), desc);
            }
        }
        Some(slots[0])
    }
}

fn garbage() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        8 => DATA..GUEST + BYTES - 0x2000,
        4 => (0..TABLE_SLOTS).prop_map(|i| TABLES + 16 * i),
        1 => any::<u64>(),
        1 => GUEST + BYTES - 16..GUEST + BYTES + 16,
    ];
    // Tables of more than 65535 entries are left out: one looks no further than it must, the other refuses them.
    let len = prop_oneof![8 => (1..20u32).prop_map(|n| 16 * n), 2 => 0..0x2000u32, 1 => 0..16 * 65536u32];
    let flags = prop_oneof![6 => prop::sample::select(vec![0u16, 1, 2, 3, 4]), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn valid_chains_are_read_alike(
        chains in prop::collection::vec(valid_chain(), 1..12),
        free in Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle(),
        base: u16,
    ) {
        let both = Both::new();
        let mut free = free;
        let mut heads = Vec::new();
        for (i, chain) in chains.iter().enumerate() {
            let Some(head) = chain.write(&both, TABLES + 16 * 12 * i as u64, &mut free) else { break };
            both.layout().set_avail_ring(base.wrapping_add(i as u16), head);
            heads.push(head);
        }
        both.layout().set_avail_idx(base.wrapping_add(heads.len() as u16));
        for (i, (chain, &head)) in chains.iter().zip(&heads).enumerate() {
            let at = base.wrapping_add(i as u16);
            assert_eq!(both.ours(at), Some((head, chain.parts.clone())));
            assert_eq!(both.theirs(at), (head, chain.parts.clone()));
        }
    }
}

#[test]
fn garbage_is_refused_or_read_alike() {
    let config = ProptestConfig {
        cases: 200,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    };
    let descs = |n: usize| prop::collection::vec(garbage(), n);
    let accepted = Cell::new([0; 2]);
    TestRunner::new(config)
        .run(&(descs(SIZE.into()), descs(TABLE_SLOTS as usize)), |(ring, tables)| {
            let both = Both::new();
            for (i, &desc) in (0..SIZE).zip(&ring) {
                both.layout().set_desc(i, desc);
                both.layout().set_avail_ring(i, i);
            }
            for (i, &desc) in (0..).zip(&tables) {
                both.set_table(TABLES + 16 * i, desc);
            }
            for i in 0..SIZE {
                both.layout().set_avail_idx(i + 1);
                if let Some(chain) = both.ours(i) {
                    assert_eq!(chain, both.theirs(i));
                    let indirect = usize::from(ring[usize::from(i)].flags & DESC_F_INDIRECT != 0);
                    let mut counts = accepted.get();
                    counts[indirect] += 1;
                    accepted.set(counts);
                }
            }
            Ok(())
        })
        .unwrap();
    // Else the garbage has been too bad to tell anything.
    assert!(accepted.get().iter().all(|&n| n > 50), "{accepted:?}");
}
