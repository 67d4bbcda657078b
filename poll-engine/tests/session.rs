//! The vhost-user session over a real socket: negotiation, configuration space, what is refused, and how it ends.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use poll_engine::engine::pacing::Pacing;
use poll_engine::ring::driver::Buffer;
use support::{Back, FEATURES, Guest, Peer, QUEUES, longs, readable_within, until, words};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Another implementation of the protocol's other half.
#[test]
fn the_vhost_crates_front_end_gets_along() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = Frontend::connect(&back.socket, QUEUES.into()).unwrap();
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    assert_eq!(offered & FEATURES, FEATURES);
    front.set_features(FEATURES).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(protocol.contains(wanted));
    front.set_protocol_features(wanted).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front.get_queue_num().unwrap(), u64::from(QUEUES));
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);

    front.set_config(40, VhostUserConfigFlags::WRITABLE, &[9, 8]).unwrap();
    let (_, bytes) = front.get_config(38, 6, VhostUserConfigFlags::empty(), &[0; 6]).unwrap();
    assert_eq!(bytes, [38, 39, 9, 8, 42, 43]);

    let mut guest = Guest::new(1);
    let spec = guest.ram.spec();
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: spec.guest_addr,
        memory_size: spec.size,
        userspace_addr: spec.user_addr,
        mmap_offset: 0,
        mmap_handle: guest.ram.fd().as_raw_fd(),
    };
    front.set_mem_table(&[info]).unwrap();
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let config = &guest.config;
    front.set_vring_num(1, 16).unwrap();
    front.set_vring_base(1, 0).unwrap();
    let addresses = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: config.desc_addr,
        used_ring_addr: config.used_addr,
        avail_ring_addr: config.avail_addr,
        log_addr: None,
    };
    front.set_vring_addr(1, &addresses).unwrap();
    front.set_vring_call(1, &call).unwrap();
    front.set_vring_kick(1, &kick).unwrap();
    front.set_vring_enable(1, true).unwrap();
    for _ in 0..100 {
        guest.driver.add(&[Buffer { addr: guest.data, len: 4, writable: true }]).unwrap();
        if guest.driver.publish() {
            kick.write(1).unwrap();
        }
        until("the request", || guest.driver.collect().is_some());
    }
    until("an interrupt", || call.read().is_ok());
    assert_eq!(front.get_vring_base(1).unwrap(), 100);
    front.reset_device().unwrap();
    assert!(front.set_vring_num(7, 16).is_err());
}

#[test]
fn configuration_space_is_read_and_written_from_either_offset() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let get = |peer: &mut Peer, offset: u32, size: u32| {
        peer.ask(24, &[words(&[offset, size, 3]), vec![0; size as usize]].concat())
    };
    // Cloud Hypervisor counts from 0x100. Offset and flags come back as they went.
    for from in [0, 0x100] {
        let reply = get(&mut peer, from + 4, 3);
        assert_eq!(reply, [words(&[from + 4, 3, 3]), vec![4, 5, 6]].concat());
        let set = |offset: u32, bytes: &[u8]| {
            [words(&[from + offset, bytes.len() as u32, 0]), bytes.to_vec()].concat()
        };
        assert!(peer.ack(25, &set(50, &[1, 2]), &[]));
        assert_eq!(back.echo.config.lock().unwrap()[50..53], [1, 2, 52]);
        assert!(!peer.ack(25, &set(0, &[1, 2]), &[]), "not writable");
        assert!(!peer.ack(25, &set(63, &[1, 2]), &[]), "beyond the end");
        back.echo.config.lock().unwrap()[50] = 50;
    }
    assert_eq!(get(&mut peer, 60, 8)[12..], [60, 61, 62, 63, 0, 0, 0, 0], "zeros behind the end");
    assert_eq!(get(&mut peer, 0, 256).len(), 12 + 256);
    // An error is a reply without payload.
    assert!(get(&mut peer, 0, 257).is_empty());
    peer.send(24, false, &words(&[0, 100, 0]), &[]);
    assert!(peer.reply(24).unwrap().is_empty(), "a size that is not the payload's");
    peer.expect_alive();
}

#[test]
fn a_configuration_change_is_told_on_the_backend_channel() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    back.server.config_changed(); // nobody to tell: no harm
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
    assert!(peer.ack(21, &[], &[theirs.as_raw_fd()]));
    drop(theirs);
    back.server.config_changed();
    assert!(readable_within(&ours, 5000));
    let mut message = [0; 32];
    assert_eq!(nix::unistd::read(&ours, &mut message), Ok(12));
    assert_eq!(message[..12], words(&[2, 1, 0]));
    peer.expect_alive();
    assert!(!peer.ack(21, &[], &[]), "no descriptor");
}

#[test]
fn status_is_kept_and_writing_zero_resets() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    assert_eq!(peer.ask_number(40), 0);
    assert!(peer.ack(39, &longs(&[0xf]), &[]));
    assert_eq!(peer.ask_number(40), 0xf);
    assert!(!peer.ack(39, &longs(&[0x100]), &[]));
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    guest.round_trip();
    assert!(peer.ack(39, &longs(&[0]), &[]));
    assert_eq!((peer.ask_number(40), back.echo.resets.load(Ordering::Acquire)), (0, 1));
    guest.submit();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.driver.finished(), 0, "a queue survived the reset");
    assert!(peer.ack(34, &[], &[]));
    assert_eq!(back.echo.resets.load(Ordering::Acquire), 2);
    // And everything may begin anew, where it stopped.
    guest.describe(&mut peer, 1);
    guest.set_kick(&mut peer);
    guest.enable(&mut peer, true);
    guest.wait();
    guest.round_trip();
}

#[test]
fn what_is_refused_is_said_and_the_session_goes_on() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_raw_fd();
    let q = u32::from(QUEUES);
    let refused: &[(u32, Vec<u8>)] = &[
        (2, longs(&[FEATURES | 1 << 35])), // in order: not offered, the device is not
        (2, words(&[0])),                  // payload of 4 bytes
        (16, longs(&[1 << 2])),            // RARP: not offered
        (8, words(&[0, 0])),
        (8, words(&[0, 3])),
        (8, words(&[0, 512])),
        (8, words(&[0, 32768])),
        (8, words(&[0, 65536])),
        (8, words(&[q, 16])),
        (9, [words(&[q, 0]), longs(&[0; 4])].concat()),
        (9, vec![0; 39]),
        (10, words(&[q, 0])),
        (10, words(&[0, 65536])),
        (12, longs(&[u64::from(q) | 0x100])),
        (12, longs(&[0])), // no descriptor
        (13, longs(&[u64::from(q) | 0x100])),
        (14, longs(&[u64::from(q) | 0x100])),
        (18, words(&[q, 1])),
        (18, words(&[0, 2])),
        (18, words(&[u32::MAX, 1])),
        (6, longs(&[0, 0])), // dirty log: no descriptor
        (31, vec![]),        // inflight descriptors: not offered
        (99, vec![1, 2, 3]),
        (5, words(&[33, 0])),
        (5, words(&[1, 0])),
        (37, vec![0; 40]),
        (38, vec![0; 7]),
    ];
    for (request, payload) in refused {
        assert!(!peer.ack(*request, payload, &[]), "request {request} with {payload:?} was taken");
        peer.expect_alive();
    }
    // A regular file cannot ring.
    for request in [12, 13, 14] {
        assert!(!peer.ack(request, &longs(&[0]), &[fd]));
        assert!(!peer.ack(request, &longs(&[0]), &[fd, fd]));
    }
    peer.expect_alive();
}

#[test]
fn a_refusal_that_cannot_be_told_ends_the_session_but_not_the_next() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    peer.send(8, false, &words(&[0, 3]), &[]);
    peer.expect_hung_up();
    let mut peer = back.front();
    peer.send(11, false, &words(&[QUEUES.into(), 0]), &[]);
    peer.expect_hung_up();
    // Before REPLY_ACK is negotiated, nobody waits for an acknowledgement.
    let mut peer = back.connect();
    peer.send(3, true, &[], &[]);
    peer.expect_alive();
    drop(peer);
    back.front().expect_alive();
}

#[test]
fn sessions_end_anywhere_and_the_next_one_is_served() {
    let back = Back::start(Pacing::Adaptive);
    let whole = [words(&[8, 9, 8]), words(&[0, 16])].concat();
    for cut in 0..whole.len() {
        let mut peer = back.front();
        peer.send_bytes(&whole[..cut], &[]);
        drop(peer);
        peer = back.front();
        peer.expect_alive();
    }
    // Garbage of several kinds: a version, a reply, a length that none has.
    for header in [[1, 0, 0], [1, 2, 0], [1, 5, 0], [1, 1, 4097], [1, 1, u32::MAX], [0xffff_ffff; 3]] {
        let mut peer = back.front();
        peer.send_bytes(&words(&header), &[]);
        peer.expect_hung_up();
    }
    let mut peer = back.connect();
    let noise: Vec<u8> = (0..10_000u32).map(|i| ((i * i) >> 3) as u8).collect();
    // It may hang up before it has read all of it.
    let _ = peer.stream.write_all(&noise);
    peer.expect_hung_up();
    back.front().expect_alive();
}

#[test]
fn bytes_may_come_one_by_one() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    for byte in [words(&[8, 9, 8]), words(&[0, 16])].concat() {
        peer.send_bytes(&[byte], &[]);
        std::thread::sleep(Duration::from_millis(2));
        back.server.config_changed(); // a bell in the middle of a message
    }
    assert_eq!(peer.reply(8).unwrap(), longs(&[0]));
}

#[test]
fn half_a_message_holds_up_only_its_own_session() {
    let back = Back::start(Pacing::Adaptive);
    let half = back.front();
    half.send_bytes(&words(&[8, 9]), &[]);
    // One front end at a time: the second waits for the first to leave.
    let mut second = back.connect();
    second.send(17, false, &[], &[]);
    assert!(!readable_within(&second.stream, 100));
    drop(half);
    assert_eq!(second.reply(17).unwrap(), longs(&[QUEUES.into()]));
}

#[test]
fn stopping_does_not_wait_for_the_rest_of_a_message() {
    for bytes in [words(&[8, 9]), words(&[8, 9, 8, 0]), vec![8]] {
        let back = Back::start(Pacing::Adaptive);
        let mut peer = back.front();
        peer.send_bytes(&bytes, &[]);
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        let socket = back.socket.clone();
        drop(back);
        assert!(start.elapsed() < support::LIMIT, "{:?}", start.elapsed());
        peer.expect_hung_up();
        assert!(!socket.exists() && UnixStream::connect(&socket).is_err());
    }
}
