//! Block requests as a driver may send them and as it should not, to the real daemon: statuses, used lengths, and what
//! the statistics say of it (virtio 1.3, 5.2.6).
#![allow(clippy::unwrap_used)]

mod blk;

use blk::{DISCARD, FLUSH, Front, GET_ID, IOERR, Lane, OK, READ, Served, Shape, UNSUPP, WRITE, WRITE_ZEROES};
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;
use poll_engine::ring::driver::Buffer;

const SIZE: u64 = 4 << 20;
const SECTORS: u64 = SIZE / 512;

/// Runs `test` on a file with and without direct I/O and on memory; each disk is full of `0x5a`, or zeros.
fn on_all(args: &[&str], test: impl Fn(&mut Lane, &Served, u8)) {
    let scene = Scene::new().unwrap();
    let image = Image::filled(&scene, "disk.img", SIZE, 0x5a).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    for (storage, fill) in
        [(&[&file, "--direct=on"][..], 0x5a), (&[&file, "--direct=off"], 0x5a), (&["--backend=ram:4M"], 0)]
    {
        Image::filled(&scene, "disk.img", SIZE, 0x5a).unwrap();
        let served = Served::start(&scene, &[storage, args].concat());
        let mut front = Front::connect(&served.socket, 1);
        test(&mut front.queues[0], &served, fill);
        drop(front);
        served.terminate();
    }
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn used_lengths_count_what_was_written() {
    on_all(&["--serial=kickless-1"], |lane, _, fill| {
        let data = lane.area + 4096;
        for len in [512, 4096, 32768] {
            assert_eq!(lane.request(READ, 3, &Shape { into: &[len], ..Shape::default() }), (OK, len + 1));
            assert_eq!(lane.get(data, len as usize), vec![fill; len as usize]);
            assert_eq!(lane.request(WRITE, 3, &Shape { out: &[len], ..Shape::default() }), (OK, 1));
        }
        assert_eq!(lane.request(FLUSH, 0, &Shape::default()), (OK, 1));
        assert_eq!(lane.request(GET_ID, 0, &Shape { into: &[20], ..Shape::default() }), (OK, 21));
        assert_eq!(lane.get(data, 20), b"kickless-1\0\0\0\0\0\0\0\0\0\0");
        // Longer and shorter than an id. Behind the id there is a gap before the status, which ends the count.
        lane.put(data, &[0xee; 32]);
        assert_eq!(lane.request(GET_ID, 0, &Shape { into: &[32], ..Shape::default() }), (OK, 20));
        assert_eq!(lane.get(data + 20, 12), [0xee; 12]);
        assert_eq!(lane.request(GET_ID, 0, &Shape { into: &[4], ..Shape::default() }), (OK, 5));
        lane.put(data, &segment(8, 8, 0));
        assert_eq!(lane.request(DISCARD, 0, &Shape { out: &[16], ..Shape::default() }), (OK, 1));
        lane.put(data, &[segment(16, 8, 0), segment(64, 8, 1)].concat());
        assert_eq!(lane.request(WRITE_ZEROES, 0, &Shape { out: &[16, 16], ..Shape::default() }), (OK, 1));
        assert_eq!(lane.request(READ, 16, &Shape { into: &[4096], ..Shape::default() }), (OK, 4097));
        assert_eq!(lane.get(data, 4096), [0; 4096]);
        // A failed read has written nothing from the start on, however the status got there.
        assert_eq!(lane.request(READ, SECTORS, &Shape { into: &[512], ..Shape::default() }), (IOERR, 0));
    });
}

#[test]
fn a_header_may_be_cut_anywhere() {
    on_all(&[], |lane, _, fill| {
        for a in 1..15 {
            for b in a + 1..16 {
                let header = [a, b - a, 16 - b];
                let shape = Shape { header: &header, into: &[512], ..Shape::default() };
                assert_eq!(lane.request(READ, 1, &shape), (OK, 513), "{header:?}");
            }
        }
        assert_eq!(lane.get(lane.area + 4096, 512), [fill; 512]);
        let bytes = [1; 16];
        assert_eq!(
            lane.request(READ, 1, &Shape { header: &bytes, into: &[512], ..Shape::default() }),
            (OK, 513)
        );
    });
}

#[test]
fn header_and_data_may_share_a_descriptor() {
    on_all(&[], |lane, _, _| {
        // 16 bytes of header and 512 of data in one, then cut across their border.
        for cuts in [vec![528], vec![10, 518], vec![20, 508], vec![1, 526, 1]] {
            let data: Vec<u8> = (0..1008u32).map(|i| (i % 251) as u8 ^ cuts.len() as u8).collect();
            lane.put(lane.area + 16, &data);
            assert_eq!(lane.request(WRITE, 9, &Shape { header: &cuts, ..Shape::default() }), (OK, 1));
            assert_eq!(lane.request(READ, 9, &Shape { into: &[512], ..Shape::default() }), (OK, 513));
            assert_eq!(lane.get(lane.area + 4096, 512), data[..512], "{cuts:?}");
        }
        // Data and status in one.
        let status_behind = [
            Buffer { addr: lane.area, len: 16, writable: false },
            Buffer { addr: lane.area + 8192, len: 513, writable: true },
        ];
        lane.put(lane.area + 8192, &[0xff; 513]);
        assert_eq!(lane.serve(&status_behind), 513);
        assert_eq!(lane.get(lane.area + 8192 + 512, 1), [OK]);
    });
}

#[test]
fn data_may_be_of_odd_pieces_at_odd_addresses() {
    on_all(&[], |lane, served, _| {
        let shapes: [&[u32]; 6] = [
            &[4096],
            &[1, 511, 513, 3071],
            &[4095, 1],
            &[7; 4096 / 7 + 1],
            &[512; 8],
            &[1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 3865],
        ];
        for (i, shape) in shapes.iter().enumerate() {
            // No more than the ring has room for.
            let mut cut: Vec<u32> = shape.iter().copied().take(40).collect();
            let short = 4096 - cut.iter().sum::<u32>();
            cut.extend((short > 0).then_some(short));
            for skew in [0, 1, 4, 510, 512] {
                let at = lane.more + skew;
                let bytes: Vec<u8> = (0..4096u32).map(|b| (b * 31 + skew as u32 + i as u32) as u8).collect();
                lane.put(at, &bytes);
                let write = Shape { out: &cut, out_at: Some(at), ..Shape::default() };
                assert_eq!(lane.request(WRITE, 40, &write), (OK, 1));
                lane.put(at, &[0; 4096]);
                let read = Shape { into: &cut, into_at: Some(at), ..Shape::default() };
                assert_eq!(lane.request(READ, 40, &read), (OK, 4097));
                assert_eq!(lane.get(at, 4096), bytes, "{cut:?} at {skew}");
            }
        }
        // Longer than one bounce buffer, and at the end of the disk.
        let bytes: Vec<u8> = (0..600_000u32 / 512 * 512).map(|b| (b * 13 + b / 999) as u8).collect();
        let sector = SECTORS - bytes.len() as u64 / 512;
        let at = lane.more + 3;
        lane.put(at, &bytes);
        let len = bytes.len() as u32;
        let write = Shape { out: &[1001, len - 1001], out_at: Some(at), ..Shape::default() };
        assert_eq!(lane.request(WRITE, sector, &write), (OK, 1));
        lane.put(at, &vec![0; bytes.len()]);
        let read = Shape { into: &[len - 77, 77], into_at: Some(at), ..Shape::default() };
        assert_eq!(lane.request(READ, sector, &read), (OK, len + 1));
        assert!(lane.get(at, bytes.len()) == bytes);
        assert!(!served.stats().contains("\nerrors "));
    });
}

#[test]
fn bad_requests_are_answered_and_counted() {
    on_all(&[], |lane, served, _| {
        let data = lane.area + 4096;
        let mut range = 0;
        for (sector, len) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512)]
        {
            assert_eq!(lane.request(READ, sector, &Shape { into: &[len], ..Shape::default() }), (IOERR, 0));
            assert_eq!(lane.request(WRITE, sector, &Shape { out: &[len], ..Shape::default() }), (IOERR, 1));
            range += 2;
        }
        let mut malformed = 0;
        for len in [1, 511, 513, 1000] {
            assert_eq!(lane.request(READ, 0, &Shape { into: &[len], ..Shape::default() }), (IOERR, 0));
            assert_eq!(lane.request(WRITE, 0, &Shape { out: &[len], ..Shape::default() }), (IOERR, 1));
            malformed += 2;
        }
        for kind in [READ, WRITE, DISCARD, WRITE_ZEROES] {
            assert_eq!(lane.request(kind, 0, &Shape::default()), (IOERR, 1), "no data");
            malformed += 1;
        }
        for len in [15, 17, 16 * 33] {
            assert_eq!(lane.request(DISCARD, 0, &Shape { out: &[len], ..Shape::default() }), (IOERR, 1));
            malformed += 1;
        }
        let mut unsupported = 0;
        for kind in [2, 3, 5, 9, 14, 16, 99, 1 << 31, u32::MAX] {
            assert_eq!(lane.request(kind, 0, &Shape::default()), (UNSUPP, 1), "type {kind}");
            unsupported += 1;
        }
        for (kind, bad) in
            [(DISCARD, segment(0, 8, 1)), (DISCARD, segment(0, 8, 2)), (WRITE_ZEROES, segment(0, 8, 2))]
        {
            lane.put(data, &bad);
            assert_eq!(lane.request(kind, 0, &Shape { out: &[16], ..Shape::default() }), (UNSUPP, 1));
            unsupported += 1;
        }
        for bad in
            [segment(SECTORS, 8, 0), segment(0, 0, 0), segment(u64::MAX, 8, 0), segment(0, u32::MAX, 0)]
        {
            for kind in [DISCARD, WRITE_ZEROES] {
                // Behind a good one, which must not be acted on either.
                lane.put(data, &[segment(0, 8, 0), bad.clone()].concat());
                assert_eq!(lane.request(kind, 0, &Shape { out: &[32], ..Shape::default() }), (IOERR, 1));
                range += 1;
            }
        }
        // No writable byte for the status, no header, half a header: nothing to say it with but the length.
        let header = Buffer { addr: lane.area, len: 16, writable: false };
        let status = Buffer { addr: lane.area + 1024, len: 1, writable: true };
        assert_eq!(lane.serve(&[header]), 0);
        assert_eq!(lane.serve(&[status]), 1);
        assert_eq!(lane.serve(&[Buffer { len: 15, ..header }, status]), 1);
        assert_eq!(lane.get(lane.area + 1024, 1), [IOERR]);
        malformed += 3;
        lane.verified_io(0, 1);
        let counted =
            ["range", "malformed", "unsupported", "ring", "memory", "io"].map(|kind| served.errors(kind));
        assert_eq!(counted, [range, malformed, unsupported, 0, 0, 0], "{}", served.stats());
    });
}

#[test]
fn a_bad_range_leaves_the_good_one_before_it_alone() {
    on_all(&[], |lane, _, fill| {
        lane.verified_io(4, 3);
        let before = lane.get(lane.area + 4096, 512);
        lane.put(lane.area + 8192, &[segment(4, 1, 0), segment(SECTORS, 1, 0)].concat());
        let shape = Shape { out: &[32], out_at: Some(lane.area + 8192), ..Shape::default() };
        assert_eq!(lane.request(WRITE_ZEROES, 0, &shape), (IOERR, 1));
        assert_eq!(lane.request(READ, 4, &Shape { into: &[1024], ..Shape::default() }), (OK, 1025));
        assert_eq!(lane.get(lane.area + 4096, 1024), [before, vec![fill; 512]].concat());
    });
}

#[test]
fn a_read_only_disk_refuses_to_change() {
    on_all(&["--read-only"], |lane, served, fill| {
        assert_eq!(lane.request(WRITE, 0, &Shape { out: &[512], ..Shape::default() }), (IOERR, 1));
        lane.put(lane.area + 4096, &segment(0, 8, 0));
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(lane.request(kind, 0, &Shape { out: &[16], ..Shape::default() }), (IOERR, 1));
        }
        assert_eq!(lane.request(FLUSH, 0, &Shape::default()), (OK, 1));
        assert_eq!(lane.request(READ, 0, &Shape { into: &[4096], ..Shape::default() }), (OK, 4097));
        assert_eq!(lane.get(lane.area + 4096, 4096), [fill; 4096]);
        assert_eq!(served.errors("read-only"), 3);
    });
}
