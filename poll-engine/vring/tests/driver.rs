//! The driver side over plain memory, with a second layout of the same memory as the device.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // rings in memory of our own

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use vring::driver::{Buffer, DriverRing, Layout, Negotiated};
use vring::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout, USED_F_NO_NOTIFY,
    split_bytes,
};

const SIZE: u16 = 4;
/// Where the rings lie in the memory, behind the descriptors.
const AVAIL: usize = 128;
const USED: usize = 256;

/// Memory for one ring; leaked, so that layouts may live as long as they like.
#[derive(Clone, Copy)]
struct Memory(NonNull<u8>);

impl Memory {
    fn new() -> Memory {
        let (desc, avail, used) = split_bytes(SIZE);
        assert!(desc as usize <= AVAIL && avail as usize <= USED - AVAIL && used as usize <= 512 - USED);
        let words = Box::into_raw(Box::new([0_u128; 512 / 16]));
        Memory(NonNull::new(words).unwrap().cast())
    }

    fn part(self, offset: usize) -> NonNull<u8> {
        assert!(offset < 512);
        // SAFETY: inside the memory.
        unsafe { self.0.add(offset) }
    }

    fn layout(self) -> SplitLayout {
        // SAFETY: the parts fit (checked in `new`), are aligned to 16 bytes, and are never freed; their bytes are
        // accessed through layouts and `u16_at`.
        unsafe { SplitLayout::at(self.part(0), self.part(AVAIL), self.part(USED), SIZE) }
    }

    /// A number of the ring as it lies in memory.
    fn u16_at(self, offset: usize) -> u16 {
        assert!(offset.is_multiple_of(2));
        // SAFETY: aligned and inside the memory; accessed atomically.
        let number = unsafe { self.part(offset).cast::<AtomicU16>().as_ref() };
        u16::from_le(number.load(Ordering::Relaxed))
    }
}

fn driver(layout: SplitLayout, base: u32, event_idx: bool) -> DriverRing {
    DriverRing::new(Layout::Split(layout), base, Negotiated { event_idx, in_order: false })
}

fn buffer(addr: u64, len: u32, writable: bool) -> Buffer {
    Buffer { addr, len, writable }
}

/// Finishes the next request, as a device would.
fn finish(device: &SplitLayout, len: u32) {
    let used = device.used_idx();
    let head = device.avail_ring(used);
    device.set_used_ring(used, head, len);
    device.set_used_idx(used.wrapping_add(1));
}

#[test]
fn every_field_lies_where_the_specification_says() {
    let memory = Memory::new();
    let layout = memory.layout();
    let n = usize::from(SIZE);
    layout.set_desc(1, Desc { addr: 0x1_0002_0003_0004, len: 0x0005_0006, flags: 7, next: 8 });
    let desc: Vec<u16> = (0..8).map(|i| memory.u16_at(16 + 2 * i)).collect();
    assert_eq!(desc, [4, 3, 2, 1, 6, 5, 7, 8]);
    assert_eq!(layout.desc(SIZE + 1).addr, 0x1_0002_0003_0004, "the index wraps");

    layout.set_avail_flags(11);
    layout.set_avail_idx(12);
    (0..SIZE).for_each(|i| layout.set_avail_ring(i, 13 + i));
    layout.set_used_event(17);
    let avail: Vec<u16> = (0..n + 3).map(|i| memory.u16_at(AVAIL + 2 * i)).collect();
    assert_eq!(avail, [11, 12, 13, 14, 15, 16, 17]);

    layout.set_used_flags(21);
    layout.set_used_idx(22);
    (0..SIZE).for_each(|i| layout.set_used_ring(i, 0x30 + i, 0x40_0000 + u32::from(i)));
    layout.set_avail_event(23);
    let used: Vec<u16> = (0..4 * n + 3).map(|i| memory.u16_at(USED + 2 * i)).collect();
    let ring = (0..SIZE).flat_map(|i| [0x30 + i, 0, i, 0x40]);
    assert_eq!(used, [21, 22].into_iter().chain(ring).chain([23]).collect::<Vec<_>>());
    assert_eq!(layout.used_ring(3), (0x33, 0x40_0003));
}

#[test]
fn requests_go_round_a_ring_that_wraps() {
    let memory = Memory::new();
    let device = memory.layout();
    device.set_avail_idx(0xfffe);
    device.set_used_idx(0xfffe);
    let mut driver = driver(memory.layout(), 0xfffe, false);
    for i in 0..20u32 {
        let buffers = [buffer(0x1000, 16, false), buffer(0x2000, 512, true), buffer(0x3000, 1, true)];
        let head = driver.add(&buffers).unwrap();
        assert_eq!(driver.add(&buffers[..2]), None, "one descriptor is left");
        assert!(driver.publish());
        assert!(!driver.publish(), "there is nothing new");
        let slot = 0xfffe_u16.wrapping_add(i as u16);
        assert_eq!((device.avail_idx(), device.avail_ring(slot)), (slot.wrapping_add(1), head));
        let mut index = head;
        for (at, b) in buffers.iter().enumerate() {
            let desc = device.desc(index);
            let next = if at < 2 { DESC_F_NEXT } else { 0 };
            assert_eq!((desc.addr, desc.len), (b.addr, b.len));
            assert_eq!(desc.flags, next | if b.writable { DESC_F_WRITE } else { 0 });
            index = desc.next;
        }
        assert_eq!((driver.finished(), driver.collect()), (0, None));
        finish(&device, i);
        assert_eq!((driver.finished(), driver.collect()), (1, Some((head, i))));
        assert_eq!(driver.free(), usize::from(SIZE));
    }
}

#[test]
fn an_indirect_table_is_handed_out_whole() {
    let memory = Memory::new();
    let device = memory.layout();
    let mut driver = driver(memory.layout(), 0, false);
    let mut table = Vec::new();
    let buffers: Vec<_> = (0..9).map(|i| buffer(0x1000 * i, 10 + i as u32, i > 4)).collect();
    let head = driver
        .add_indirect(0xabc0, &buffers, |i, bytes| {
            assert_eq!(i, table.len());
            let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
            table.push(Desc::from_pair([half(0), half(8)]));
        })
        .unwrap();
    assert_eq!(device.desc(head), Desc { addr: 0xabc0, len: 9 * 16, flags: DESC_F_INDIRECT, next: 0 });
    for (i, desc) in table.iter().enumerate() {
        let flags = if i > 4 { DESC_F_WRITE } else { 0 } | if i < 8 { DESC_F_NEXT } else { 0 };
        assert_eq!((desc.addr, desc.len, desc.flags), (buffers[i].addr, buffers[i].len, flags));
        assert!(i == 8 || usize::from(desc.next) == i + 1);
    }
    assert_eq!((table.len(), driver.free()), (9, 3));
    driver.publish();
    finish(&device, 50);
    assert_eq!((driver.collect(), driver.free()), (Some((head, 50)), 4));
}

#[test]
fn what_does_not_fit_is_not_written() {
    let mut driver = driver(Memory::new().layout(), 0, false);
    let one = [buffer(0x1000, 1, true)];
    let refuses = |driver: &mut DriverRing, buffers: &[Buffer]| {
        assert_eq!(driver.add_indirect(0, buffers, |_, _| panic!("written")), None);
    };
    assert_eq!(driver.add(&[]), None);
    refuses(&mut driver, &[]);
    refuses(&mut driver, &one.repeat(65536));
    assert_eq!(driver.free(), usize::from(SIZE));
    (0..SIZE).for_each(|_| assert!(driver.add(&one).is_some()));
    refuses(&mut driver, &one);
}

#[test]
fn notifications_and_interrupts_by_flag() {
    let memory = Memory::new();
    let device = memory.layout();
    device.set_avail_flags(AVAIL_F_NO_INTERRUPT);
    let mut driver = driver(memory.layout(), 0, false);
    assert_eq!(device.avail_flags(), 0, "a new driver wants interrupts, whatever the last one wanted");
    device.set_used_flags(USED_F_NO_NOTIFY);
    driver.add(&[buffer(0, 1, true)]).unwrap();
    assert!(!driver.publish());
    assert!(!driver.set_interrupts(false));
    assert_eq!(device.avail_flags(), AVAIL_F_NO_INTERRUPT);
    finish(&device, 1);
    assert!(driver.set_interrupts(true), "something has finished meanwhile");
    assert_eq!(device.avail_flags(), 0);
}

#[test]
fn notifications_and_interrupts_by_event_index() {
    let memory = Memory::new();
    let device = memory.layout();
    let mut driver = driver(memory.layout(), 0, true);
    device.set_avail_event(1);
    let kicks: Vec<bool> = (0..3)
        .map(|_| {
            driver.add(&[buffer(0, 1, true)]).unwrap();
            driver.publish()
        })
        .collect();
    assert_eq!(kicks, [false, true, false], "the second passes the event");
    assert_eq!(device.used_event(), 0);
    finish(&device, 1);
    driver.collect().unwrap();
    assert_eq!(device.used_event(), 1, "an interrupt for the next");
    driver.set_interrupts(false);
    assert_eq!(device.used_event(), 0, "behind: passed last");
}
