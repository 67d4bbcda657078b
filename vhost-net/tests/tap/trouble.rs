//! What goes wrong while frames pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use poll_engine::device::features as ring;
use poll_engine::engine::pacing::Pacing;
use poll_engine::stats::ErrorKind;
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::header::{HEADER, VnetHdr};
use vhost_net::port::tap::Tap;

use super::guest::{Guest, engine};
use super::host::{GUEST_MAC, HOST_MAC, Host, attached, frame, ip, open_tap, until};
use super::{PLAIN, segments, short, tso};

fn count(tap: &Tap, name: &str) -> u64 {
    tap.counters().iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no counter {name}")).1
}

/// How often a queue is looked at in a while in which nothing happens.
fn looks(guest: &Guest) -> u64 {
    let before = guest.rx.stats.polls.get() + guest.tx.stats.polls.get();
    std::thread::sleep(Duration::from_millis(200));
    guest.rx.stats.polls.get() + guest.tx.stats.polls.get() - before
}

pub fn deleted() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let told = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&told);
    tap.on_change(move || tell.store(true, Ordering::Relaxed));
    let engine = engine(Pacing::Event);
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 64, 2048);
    guest.post(64);
    guest.send([0; HEADER], &frame(GUEST_MAC, HOST_MAC, 100, 1), 14);
    ip("link delete kl0");
    until("the end of the tap to be noticed", || tap.is_gone());
    assert!(told.load(Ordering::Relaxed));
    // The guest goes on, into nothing.
    for n in 0..100 {
        guest.send([0; HEADER], &frame(GUEST_MAC, HOST_MAC, 100, n), 14);
    }
    assert_eq!(count(&tap, "tx_queue_0_gone_drops"), 100);
    assert!(looks(&guest) < 10);
    assert_eq!(guest.rx.stop(), 0);
    guest.tx.stop();
    // So does the next one, and one that finds it gone.
    guest.start(&tap, &engine);
    guest.send([0; HEADER], &frame(GUEST_MAC, HOST_MAC, 100, 1), 14);
    guest.stop();
    let tap = Tap::open("kl1", 2, None).unwrap();
    ip("link delete kl1");
    let mut guest = Guest::on_pair(1, &tap, &engine, MRG_RXBUF, 64, 2048);
    assert!(tap.is_gone());
    guest.send([0; HEADER], &frame(GUEST_MAC, HOST_MAC, 100, 1), 14);
    assert_eq!(count(&tap, "tx_queue_1_gone_drops"), 1);
    guest.stop();
}

/// A tap that is made anew goes on with the guest that it had, with one queue and with several.
pub fn made_anew() {
    for (pairs, pair, kind) in [(1, 0, ""), (1, 0, " multi_queue"), (2, 1, " multi_queue")] {
        let tap = Tap::open("kl0", pairs, None).unwrap();
        let told = Arc::new(AtomicUsize::new(0));
        let tell = Arc::clone(&told);
        tap.on_change(move || _ = tell.fetch_add(1, Ordering::Relaxed));
        let engine = engine(Pacing::Event);
        let features = MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
        let mut guest = Guest::on_pair(pair, &tap, &engine, features, 64, 2048);
        guest.post(64);
        for round in 1..3 {
            ip("link delete kl0");
            until("the end of the tap to be noticed", || tap.is_gone());
            ip(&format!("tuntap add kl0 mode tap vnet_hdr{kind}"));
            ip("link set kl0 up");
            until("its return", || !tap.is_gone());
            until("both to be told", || told.load(Ordering::Relaxed) == 2 * round);
            let host = Host::on("kl0");
            let out = frame(GUEST_MAC, HOST_MAC, 100, 1);
            guest.send([0; HEADER], &out, 14);
            assert_eq!(host.wait(), (PLAIN, out));
            // What the driver takes undone is known there as well.
            let big = segments(HOST_MAC, GUEST_MAC, 20_000);
            host.send(short(&tso(1448)), &big);
            let (_, got) = guest.wait();
            assert!(got == big, "{} bytes for {}", got.len(), big.len());
            guest.post(64);
        }
        guest.stop();
        drop(tap);
        ip("link delete kl0");
    }
}

/// Somebody else reads what a queue was woken for. It is watched on, without spinning, and its end is noticed.
pub fn robbed() {
    let tun = attached("kl0", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    ip("link set kl0 up");
    fcntl(&tun, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let robber = tun.try_clone().unwrap();
    let tap = Tap::inherit(vec![tun], None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 256, 2048);
    guest.post(256);
    let (stolen, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                if nix::unistd::read(&robber, &mut [0; 2048]).is_ok() {
                    stolen.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let (mut sent, mut received) = (0, 0);
        until("the other one to have some", || {
            host.send(PLAIN, &frame(HOST_MAC, GUEST_MAC, 100, 1));
            sent += 1;
            until("one of them to have it", || {
                let got = guest.receive().is_some();
                guest.post(got.into());
                received += usize::from(got);
                received + stolen.load(Ordering::Relaxed) == sent
            });
            stolen.load(Ordering::Relaxed) > 100
        });
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(looks(&guest) < 10, "it spins");
    let sent = frame(HOST_MAC, GUEST_MAC, 100, 2);
    host.send(PLAIN, &sent);
    assert_eq!(guest.wait().1, sent);
    ip("link delete kl0");
    until("the end of the tap to be noticed", || tap.is_gone());
    guest.stop();
}

pub fn without_buffers() {
    for features in [0, ring::RING_PACKED] {
        let tap = open_tap();
        let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
        let mut guest = Guest::on(&tap, &engine, MRG_RXBUF | features, 256, 2048);
        let sent: Vec<Vec<u8>> = (0..100).map(|n| frame(HOST_MAC, GUEST_MAC, 60 + n, n as u32)).collect();
        for frame in &sent {
            host.send(PLAIN, frame);
        }
        until("wait for buffers", || count(&tap, "rx_queue_0_waits") == 1);
        assert!(looks(&guest) < 10, "it spins");
        for (n, frame) in sent.iter().enumerate() {
            // A few now and then.
            guest.post(n % 3);
            if n % 3 == 0 {
                guest.post(1);
            }
            let (_, got) = guest.wait();
            assert_eq!(&got, frame, "frame {n}");
        }
        // Buffers with nothing to be put into them keep nobody awake.
        guest.post(256);
        assert!(looks(&guest) < 10, "it spins");
        guest.stop();
        assert_eq!(count(&tap, "rx_queue_0_no_buffer_drops"), 0);
    }
}

pub fn too_few_buffers() {
    for (format, pacing) in [(0, Pacing::Event), (ring::RING_PACKED, Pacing::Busy)] {
        let tap = open_tap();
        let (engine, host) = (engine(pacing), Host::on("kl0"));
        let features = MRG_RXBUF | GUEST_CSUM | GUEST_TSO4 | format;
        let mut guest = Guest::on(&tap, &engine, features, 128, 1526);
        let big = segments(HOST_MAC, GUEST_MAC, 60_000);
        let small = frame(HOST_MAC, GUEST_MAC, 60, 1);
        guest.post(5);
        host.send(short(&tso(1448)), &big);
        host.send(PLAIN, &small);
        until("wait for buffers", || count(&tap, "rx_queue_0_waits") == 1);
        assert!(guest.receive().is_none());
        guest.post(5);
        std::thread::sleep(Duration::from_millis(20));
        assert!(guest.receive().is_none());
        guest.post(118);
        let (header, got) = guest.wait();
        assert!(got == big);
        assert_eq!(VnetHdr::from_bytes(&header).num_buffers, (60_066u16).div_ceil(1526));
        assert_eq!(guest.wait().1, small);
        // Stopped while one waits, that is lost and counted, and the buffers are all the guest's.
        guest.rx.stop();
        guest.tx.stop();
        let mut guest = Guest::on(&tap, &engine, features, 128, 1526);
        guest.post(5);
        host.send(short(&tso(1448)), &big);
        until("wait for buffers", || count(&tap, "rx_queue_0_waits") == 2);
        let base = guest.rx.stop();
        let start = if format == 0 { 0 } else { 1 << 15 | 1 << 31 };
        assert_eq!(base, start, "{base:#x}");
        assert_eq!(count(&tap, "rx_queue_0_no_buffer_drops"), 1);
        guest.tx.stop();
        // What no ring full of buffers can hold is dropped, and what follows is not.
        let mut guest = Guest::on(&tap, &engine, features, 16, 1526);
        guest.post(16);
        host.send(short(&tso(1448)), &big);
        host.send(PLAIN, &small);
        assert_eq!(guest.wait().1, small);
        assert_eq!(count(&tap, "rx_queue_0_length_drops"), 1);
        guest.stop();
    }
}

pub fn stops_at_once() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    for pacing in [Pacing::Busy, Pacing::Event] {
        let (engine, host) = (engine(pacing), Host::on("kl0"));
        let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 64, 2048);
        guest.post(64);
        for n in 0..20 {
            let small = frame(HOST_MAC, GUEST_MAC, 60, n);
            host.send(PLAIN, &small);
            assert_eq!(guest.wait().1, small);
            let begun = Instant::now();
            assert_eq!(guest.rx.stop(), n + 1, "buffers that were not used");
            guest.tx.stop();
            assert!(begun.elapsed() < Duration::from_secs(60));
            guest.start(&tap, &engine);
        }
        guest.stop();
    }
}

pub fn lies() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF | CSUM | HOST_TSO4, 2048, 2048);
    let good = segments(GUEST_MAC, HOST_MAC, 5000);
    let one = VnetHdr { flags: 1, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let liars = [
        VnetHdr { gso_type: 77, ..tso(1448) },
        VnetHdr { gso_type: 4, ..tso(1448) },
        VnetHdr { gso_type: 0x81, ..tso(1448) },
        VnetHdr { flags: 0, ..tso(1448) },
        tso(0),
        VnetHdr { csum_start: 60_000, ..one },
        VnetHdr { csum_offset: 60_000, ..one },
        VnetHdr { csum_start: 65_535, csum_offset: 65_535, ..tso(1448) },
    ];
    for header in liars {
        guest.send(header.to_bytes(), &good, 54);
    }
    assert_eq!(count(&tap, "tx_queue_0_header_drops"), liars.len() as u64);
    // Nothing, nothing but a header, and a byte; what no frame is as long as; more pieces than there may be.
    let bytes = vec![0; 100 << 10];
    for len in [1, HEADER - 1, HEADER, HEADER + 1, HEADER + 13] {
        guest.send_raw(&bytes[..len], &[len]);
    }
    assert_eq!(count(&tap, "tx_queue_0_short_drops"), 5);
    guest.send_raw(&bytes[..66_000], &[66_000]);
    guest.send_raw(&bytes[..HEADER + 1400], &[&[HEADER][..], &[1; 1400]].concat());
    assert_eq!(count(&tap, "tx_queue_0_length_drops"), 2);
    assert_eq!(guest.tx.stats.errors(ErrorKind::Malformed), liars.len() as u64 + 7);
    assert!(host.receive().is_none());
    // The header in pieces, and the frame in as many as may be.
    guest.send_raw(&[&tso(1448).to_bytes()[..], &good].concat(), &[5, 7, 1, 53, 5000]);
    assert!(host.wait().1 == good);
    let many = frame(GUEST_MAC, HOST_MAC, 1000, 3);
    guest.send_raw(&[&[0; HEADER], &many[..]].concat(), &[&[HEADER][..], &[1; 1000]].concat());
    assert_eq!(host.wait().1, many);
    assert_eq!(count(&tap, "tx_queue_0_packets"), 2);
    // An interface that is down takes nothing, and goes on when it is up.
    ip("link set kl0 down");
    guest.send([0; HEADER], &many, 14);
    assert_eq!(count(&tap, "tx_queue_0_link_down_drops"), 1);
    ip("link set kl0 up");
    guest.send([0; HEADER], &many, 14);
    assert_eq!(host.wait().1, many);
    guest.stop();
}

pub fn small_buffers() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    for len in [1, HEADER as u32 - 1, HEADER as u32] {
        let before = count(&tap, "rx_queue_0_small_buffer_errors");
        let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 64, len);
        guest.post(40);
        host.send(PLAIN, &frame(HOST_MAC, GUEST_MAC, 60, 1));
        for _ in 0..40 {
            until("a useless buffer to come back", || guest.returned());
        }
        assert_eq!(count(&tap, "rx_queue_0_small_buffer_errors") - before, 40);
        guest.stop();
    }
    // Without mergeable buffers what does not fit is dropped, and costs no buffer.
    let mut guest = Guest::on(&tap, &engine, 0, 64, 100);
    guest.post(2);
    // Those that waited for useful buffers.
    for _ in 0..3 {
        guest.wait();
        guest.post(1);
    }
    host.send(PLAIN, &frame(HOST_MAC, GUEST_MAC, 1000, 2));
    let fits = frame(HOST_MAC, GUEST_MAC, 88, 3);
    host.send(PLAIN, &fits);
    assert_eq!(guest.wait().1, fits);
    assert_eq!(count(&tap, "rx_queue_0_length_drops"), 1);
    guest.stop();
}

/// Frames that waited for one guest and find another, which takes less.
pub fn another_guest() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, 64, 2048);
    guest.stop();
    host.send(short(&tso(1448)), &segments(HOST_MAC, GUEST_MAC, 20_000));
    let plain = frame(HOST_MAC, GUEST_MAC, 60, 1);
    host.send(PLAIN, &plain);
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 64, 2048);
    guest.post(64);
    assert_eq!(guest.wait().1, plain);
    assert_eq!(count(&tap, "rx_queue_0_offload_drops"), 1);
    guest.stop();
}
