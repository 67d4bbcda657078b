//! The arithmetic of both rings over its whole domain, each piece against the sentence of the specification that it is
//! to keep (virtio 1.3). Where a domain is walked in part, the test says which part, and why the rest follows.
#![allow(clippy::unwrap_used)]

use vring::layout::need_event;
use vring::packed::{DESC_F_AVAIL, DESC_F_USED, Event, Position, passes};

/// All positions of a ring.
fn positions(size: u16) -> impl Iterator<Item = Position> {
    [true, false].into_iter().flat_map(move |wrap| (0..size).map(move |index| Position { index, wrap }))
}

/// Small rings are walked whole; of large ones, those beside the limits and the powers of two: `advance` and `since`
/// use the size in additions and comparisons only, so sizes differ in nothing else.
const LARGE: [u16; 8] = [255, 256, 257, 1023, 1024, 16384, 32767, 32768];

/// 2.7.10.1: "if the idx field in the used ring (which determined where that descriptor index was placed) was equal to
/// used_event, the device MUST send an interrupt": an event is passed when it is among `old`, `old` + 1, ... and not
/// `new`. All distances from `old` to the event for all moves: the whole domain, since only differences count (the last
/// assertion moves all three numbers along, for every `old`).
#[test]
fn split_an_event_is_due_exactly_when_it_is_passed() {
    for moved in 0..=u16::MAX {
        // Both sides of each border, and every distance for the moves that rings can make.
        let all = moved <= 300 || moved >= 0xff00;
        let near = [0, 1, moved.wrapping_sub(1), moved, moved.wrapping_add(1), 0x7fff, 0x8000, 0xffff];
        let whole = (0..if all { 0x1_0000u32 } else { 0 }).map(|n| n as u16);
        for ahead in whole.chain(near) {
            assert_eq!(need_event(ahead, moved, 0), ahead < moved, "event {ahead} new {moved}");
        }
    }
    for old in 0..=u16::MAX {
        for (moved, ahead) in [(1, 0), (1, 1), (16, 15), (16, 16), (0, 0), (0xffff, 0xfffe), (0xffff, 0xffff)]
        {
            let (event, new) = (old.wrapping_add(ahead), old.wrapping_add(moved));
            assert_eq!(need_event(event, new, old), ahead < moved);
        }
    }
}

/// 2.8.1: "The driver changes the value of this counter each time it makes available the last descriptor in the ring",
/// and the device "each time it uses the last descriptor in the ring": to advance by `n` is to advance by one, `n`
/// times. All sizes up to 48 with all positions and all counts.
#[test]
fn packed_the_wrap_counter_changes_behind_the_last_descriptor() {
    let one = |at: Position, size: u16| match at.index + 1 {
        end if end == size => Position { index: 0, wrap: !at.wrap },
        index => Position { index, wrap: at.wrap },
    };
    for size in 1..=48 {
        for start in positions(size) {
            let mut at = start;
            for count in 0..=size {
                assert_eq!(start.advance(count, size), at, "{start:?} + {count} of {size}");
                at = one(at, size);
            }
        }
    }
    for size in LARGE {
        for start in positions(size) {
            assert_eq!(start.advance(1, size), one(start, size));
            assert_eq!(start.advance(size, size), Position { wrap: !start.wrap, ..start });
        }
    }
}

/// 2.8.1: "The driver changes the value of this counter each time it makes available the last descriptor in the ring", so
/// that a position with its counter comes again after two rounds, and until then each step is one further. The way back:
/// how far one position is behind another. All sizes up to 48, all positions, all distances below two
/// rings.
#[test]
fn packed_distances_are_those_walked() {
    for size in 1..=48 {
        for start in positions(size) {
            let mut at = start;
            for walked in 0..2 * u32::from(size) {
                assert_eq!(at.since(start, size), walked);
                at = at.advance(1, size);
            }
            assert_eq!(at, start, "twice round is where it began");
        }
    }
    for size in LARGE {
        let n = u32::from(size);
        for start in positions(size) {
            let (next, round) = (start.advance(1, size), start.advance(size, size));
            assert_eq!((next.since(start, size), start.since(next, size)), (1, 2 * n - 1));
            assert_eq!(round.since(start, size), n);
        }
    }
}

/// 2.8.1, the same sentence: what changes the counter on the way over the last descriptor must change it on the way back.
/// A chain that goes back to those that are available, and a step of one: both are `advance` in other words. All sizes up to
/// 48 with all positions and counts; of large ones, counts beside the limits.
#[test]
fn packed_back_and_one_on_are_what_they_undo_and_repeat() {
    for size in (1..=48).chain(LARGE) {
        let counts =
            |start: u16| [0, 1, 2, start, start + 1, size / 2, size - 1, size].into_iter().chain(0..=48);
        for start in positions(size) {
            assert_eq!(start.next(size), start.advance(1, size), "{start:?} of {size}");
            for count in counts(start.index).filter(|&count| count <= size) {
                assert_eq!(
                    start.advance(count, size).retreat(count, size),
                    start,
                    "{start:?} + {count} of {size}"
                );
                assert_eq!(
                    start.retreat(count, size).advance(count, size),
                    start,
                    "{start:?} - {count} of {size}"
                );
            }
        }
    }
}

/// 2.8.1: "the driver sets the VIRTQ_DESC_F_AVAIL bit in Flags to match the internal Driver Ring Wrap Counter. It also
/// sets the VIRTQ_DESC_F_USED bit to match the inverse value"; "the device sets the VIRTQ_DESC_F_USED bit in Flags to
/// match the internal Device Ring Wrap Counter. It also sets the VIRTQ_DESC_F_AVAIL bit to match the same value". All
/// flags with both wrap counters.
#[test]
fn packed_available_and_used_are_what_the_two_flags_say() {
    for wrap in [true, false] {
        let at = Position { index: 0, wrap };
        for flags in 0..=u16::MAX {
            let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
            assert_eq!(at.is_available(flags), avail == wrap && used != wrap);
            assert_eq!(at.is_used(flags), used == wrap && avail == wrap);
        }
        assert!(at.is_available(at.available()) && at.is_used(at.used()));
    }
}

/// 2.8.14: "desc_event_off : 15", "desc_event_wrap : 1". All 65,536 values.
#[test]
fn packed_positions_are_15_bits_and_one() {
    for bits in 0..=u16::MAX {
        let at = Position::from_bits(bits);
        assert_eq!((at.index, at.wrap), (bits % 0x8000, bits >= 0x8000));
        assert_eq!(at.bits(), bits);
    }
}

/// 2.8.10: "Event will only trigger when this descriptor is made available/used respectively" and "when Ring Wrap Counter
/// matches this value": against a walk over the descriptors. All sizes up to 12 with all positions, all events and all
/// counts up to more than two rings, which a device can reach that looks at the driver's wish only now and then.
#[test]
fn packed_an_event_is_due_exactly_when_its_descriptor_is_passed() {
    for size in 1..=12 {
        for start in positions(size) {
            let mut new = start;
            let mut passed = Vec::new();
            for count in 0..=2 * u32::from(size) + 3 {
                for event in positions(size) {
                    let due = passes(event, new, count, size);
                    assert_eq!(due, passed.contains(&event), "{event:?} {new:?} {count} of {size}");
                }
                passed.push(new);
                new = new.advance(1, size);
            }
        }
    }
    // Of large rings all positions, with the events on both sides of each border.
    for size in LARGE {
        for start in positions(size) {
            for count in [1, 2, size / 2, size - 1, size] {
                let new = start.advance(count, size);
                let count = u32::from(count);
                let before = start.advance(size, size).advance(size - 1, size);
                assert!(passes(start, new, count, size) && !passes(new, new, count, size));
                assert_eq!(passes(before, new, count, size), size == 1 && count > 1);
                assert!(!passes(Position { wrap: !start.wrap, ..start }, new, count, size) || size == 1);
            }
        }
    }
}

/// "The value 0x3 is reserved", and events beyond the ring are nobody's: neither may cost a notification that is owed.
#[test]
fn packed_what_makes_no_sense_notifies() {
    let at = Position::START;
    for index in 8..0x8000 {
        assert!(Event::Desc(Position { index, wrap: true }).wants(at, 1, 8, true));
    }
    assert!(Event::Enable.wants(at, 1, 8, true) && !Event::Disable.wants(at, 1, 8, true));
    // "Only valid if VIRTIO_F_RING_EVENT_IDX has been negotiated."
    assert!(Event::Desc(at).wants(at, 1, 8, false));
}
