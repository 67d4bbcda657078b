//! Guests whose control queue is the device's own: filters, pairs of queues, hashes, offloads, announcements.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use etherparse::PacketBuilder;
use poll_engine::session::wire::protocol;
use vhost_net::control::FEATURES;
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MQ, MRG_RXBUF};
use vhost_net::features::{HASH_REPORT, RSS};
use vhost_net::hub::Plan;
use vhost_net::mac::MacAddr;
use vhost_net::packet::Packet;
use vhost_net::rss::{Hasher, hash_types};
use vhost_net::stats::Drop;

use crate::guest::{Back, Guest, mac};
use crate::offload::{header, partial, with};
use crate::peer::{longs, readable_within, until, words};
use crate::{BROADCAST, expect_nothing, frame, learn};

/// Of "Verifying the RSS Hash Calculation" in Microsoft's documentation of network drivers.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
/// All but hashes, which make a longer header, and several queues.
const PLAIN: u64 = MRG_RXBUF | FEATURES & !(RSS | HASH_REPORT);
const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 1, 2, 3]);

fn filtered(back: &Back, port: usize) -> u64 {
    back.hub.ports()[port].pairs.iter().map(|pair| pair.rx_drops(Drop::Filtered)).sum()
}

/// `VIRTIO_NET_CTRL_MAC_TABLE_SET`.
fn table(unicast: &[MacAddr], multicast: &[MacAddr]) -> Vec<u8> {
    let one = |macs: &[MacAddr]| {
        let mut bytes = (macs.len() as u32).to_le_bytes().to_vec();
        for mac in macs {
            bytes.extend(mac.0);
        }
        bytes
    };
    [vec![1, 0], one(unicast), one(multicast)].concat()
}

#[test]
fn a_guest_gets_what_its_driver_has_asked_for() {
    for (plan, reactors) in [(Plan::Switch, 1), (Plan::Switch, 2), (Plan::Wire, 1)] {
        let back = Back::start_as(plan, &["", ""], 1, reactors, None, None);
        let mut sender = back.guest(0, 1);
        let mut guest = back.guest_with(1, 1, PLAIN);
        let other = MacAddr([2, 0, 0, 0, 0, 9]);
        let tagged = |vid| frame(mac(1), mac(0), Some(vid), 1, 64);
        // To itself, to another, to a group, to all, in two VLANs; in a burst, too, where the first of them or a later one is
        // not for it.
        let plain = [mac(1), other, GROUP, BROADCAST].map(|to| frame(to, mac(0), None, 1, 60));
        let burst = [&plain[1], &plain[0], &plain[0], &plain[1], &plain[0]].map(Vec::clone);
        let all = [&plain[..], &[tagged(5), tagged(6)], &burst].concat();
        let mut lost = 0;
        let mut expect = |guest: &mut Guest, wanted: [bool; 6], what: &str| {
            sender.send_burst(0, &all[..6]);
            sender.send_burst(0, &burst);
            let is_wanted =
                |frame: &&Vec<u8>| all[..6].iter().zip(wanted).any(|(f, wanted)| wanted && f == *frame);
            let wanted: Vec<_> = all.iter().filter(is_wanted).cloned().collect();
            lost += (all.len() - wanted.len()) as u64;
            until("all to be taken", || sender.all_sent());
            let mut got = guest.await_frames(wanted.len());
            assert_eq!(got.len(), wanted.len(), "{what}");
            got.truncate(wanted.len());
            assert_eq!(got, wanted, "{what}");
            assert_eq!(filtered(&back, 1), lost, "{what}");
        };
        expect(&mut guest, [true; 6], "all at first");
        let steps: [(&[u8], [u8; 6]); 12] = [
            (&[0, 0, 0], [1, 0, 0, 1, 0, 0]),
            (&table(&[other], &[]), [1, 1, 0, 1, 0, 0]),
            (&table(&[], &[GROUP]), [1, 0, 1, 1, 0, 0]),
            (&table(&[], &[]), [1, 0, 0, 1, 0, 0]),
            (&[2, 0, 5, 0], [1, 0, 0, 1, 1, 0]),
            (&[2, 0, 6, 0], [1, 0, 0, 1, 1, 1]),
            (&[2, 1, 5, 0], [1, 0, 0, 1, 0, 1]),
            (&[0, 1, 1], [1, 0, 1, 1, 0, 1]),
            (&[0, 5, 1], [1, 0, 1, 0, 0, 1]),
            (&[0, 4, 1], [0, 0, 1, 0, 0, 0]),
            (&[0, 4, 0], [1, 0, 1, 0, 0, 1]),
            (&[0, 0, 1], [1, 1, 1, 1, 1, 1]),
        ];
        for (command, wanted) in steps {
            assert_eq!(guest.command(command), 0, "{command:x?}");
            expect(&mut guest, wanted.map(|w| w != 0), &format!("{command:x?}"));
        }
        // Another driver begins anew.
        assert_eq!(guest.command(&[0, 0, 0]), 0);
        guest.command(&[0, 3, 1]);
        std::mem::drop(guest);
        until("the port to go down", || {
            back.hub.ports()[1].running.load(std::sync::atomic::Ordering::SeqCst) == 0
        });
        let mut guest = back.guest_with(1, 1, PLAIN);
        expect(&mut guest, [true; 6], "after a reset");
    }
}

#[test]
fn an_address_that_is_set_is_the_cards() {
    let back = Back::start(&["", "guard=on"], 1, 1);
    let mut guest = back.guest_with(0, 1, PLAIN);
    let mut guarded = back.guest_with(1, 1, PLAIN);
    let address =
        |guest: &mut Guest| guest.peer.ask(24, &[words(&[0, 6, 0]), vec![0; 6]].concat())[12..].to_vec();
    negotiate(&mut guest);
    negotiate(&mut guarded);
    let new = MacAddr([2, 0, 0, 0, 0, 9]);
    let set = [&[1, 1][..], &new.0].concat();
    assert_eq!(guest.command(&set), 0);
    assert_eq!(address(&mut guest), new.0);
    guest.command(&[0, 0, 0]);
    let [to_new, to_old] = [new, mac(0)].map(|to| frame(to, mac(1), None, 0, 60));
    guarded.send_burst(0, [&to_old, &to_new]);
    assert_eq!(guest.await_frames(1), [to_new]);
    // One whose packets from another address would go nowhere.
    assert_eq!(guarded.command(&set), 1);
    assert_eq!(address(&mut guarded), mac(1).0);
}

fn negotiate(guest: &mut Guest) {
    let wanted =
        protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::RARP | protocol::BACKEND_REQ;
    guest.peer.send(16, false, &longs(&[wanted]), &[]);
}

#[test]
fn as_many_queues_are_used_as_the_driver_says() {
    for reactors in [1, 2] {
        let back = Back::start(&["", ""], 4, reactors);
        let mut sender = back.guest_with(0, 4, MRG_RXBUF | MQ);
        let mut guest = back.guest_with(1, 4, PLAIN | MQ);
        let mut came = |guest: &mut Guest| {
            guest.queues.clear();
            for pair in 0..4 {
                sender.send(pair, &frame(mac(1), mac(0), None, 0, 60));
                guest.await_frames(1);
            }
            let mut queues = guest.queues.clone();
            queues.sort_unstable();
            queues.dedup();
            queues
        };
        assert_eq!(came(&mut guest), [0]);
        for (pairs, used) in [(4, &[0, 1, 2, 3][..]), (2, &[0, 1]), (3, &[0, 1, 2]), (1, &[0])] {
            assert_eq!(guest.command(&[4, 0, pairs, 0]), 0);
            assert_eq!(came(&mut guest), used);
        }
        for wrong in [0, 5] {
            assert_eq!(guest.command(&[4, 0, wrong, 0]), 1);
            assert_eq!(came(&mut guest), [0]);
        }
    }
}

/// A flow's packet, to everybody.
fn flow(source: ([u8; 4], u16), destination: ([u8; 4], u16), is_tcp: bool, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(0).0, BROADCAST.0).ipv4(source.0, destination.0, 64);
    let mut bytes = vec![];
    if is_tcp {
        builder.tcp(source.1, destination.1, 1, 1).write(&mut bytes, payload).unwrap();
    } else {
        builder.udp(source.1, destination.1).write(&mut bytes, payload).unwrap();
    }
    bytes
}

/// `VIRTIO_NET_CTRL_MQ_RSS_CONFIG`.
fn rss(types: u32, queues: &[u16], unclassified: u16) -> Vec<u8> {
    let mut bytes = vec![4, 1];
    bytes.extend(types.to_le_bytes());
    bytes.extend((queues.len() as u16 - 1).to_le_bytes());
    bytes.extend(unclassified.to_le_bytes());
    bytes.extend(queues.iter().flat_map(|q| q.to_le_bytes()));
    bytes.extend(4u16.to_le_bytes());
    bytes.push(KEY.len() as u8);
    bytes.extend(KEY);
    bytes
}

/// The hash in the last header that came, and in which queue.
fn last(guest: &mut Guest) -> (u32, u16, usize) {
    let (header, queue) = (guest.headers.pop().unwrap(), guest.queues.pop().unwrap());
    let value = u32::from_le_bytes(header[12..16].try_into().unwrap());
    let [kind, padding] = [16, 18].map(|at| u16::from_le_bytes([header[at], header[at + 1]]));
    assert_eq!(padding, 0);
    (value, kind, queue)
}

/// With and without hashes reported, of senders that have such headers themselves and others that have not, from queues on
/// the same reactor and on another.
#[test]
fn queues_are_chosen_by_hash_and_hashes_are_reported() {
    let table: Vec<u16> = (0..16).map(|i| [0, 1, 2, 3, 1, 2, 3, 3][i % 8]).collect();
    for (reactors, reports, sends) in [(1, true, 0), (2, true, 0), (2, true, HASH_REPORT), (2, false, 0)] {
        let back = Back::start(&["", ""], 4, reactors);
        let mut sender = back.guest_with(0, 4, MRG_RXBUF | MQ | sends);
        let report = if reports { HASH_REPORT } else { 0 };
        let mut guest = back.guest_with(1, 4, PLAIN | MQ | RSS | report);
        assert_eq!(guest.command(&rss(hash_types::ALL, &table, 2)), 0);
        let mut expect = |guest: &mut Guest, pair: usize, bytes: &[u8], hash: (u32, u16), queue: usize| {
            sender.send(pair, bytes);
            assert_eq!(guest.await_frames_and_headers(1), [bytes]);
            if reports {
                assert_eq!(last(guest), (hash.0, hash.1, queue));
            } else {
                assert_eq!(guest.queues.pop(), Some(queue));
            }
        };
        // Microsoft's, and one without a hash.
        let known = flow(([66, 9, 149, 187], 2794), ([161, 142, 100, 80], 1766), true, &[7; 100]);
        expect(&mut guest, 0, &known, (0x51cc_c178, 2), table[0x8].into());
        expect(&mut guest, 3, &frame(BROADCAST, mac(0), None, 1, 60), (0, 0), 2);
        let hasher = Hasher::new(hash_types::ALL, &KEY);
        for n in 0..64u16 {
            let is_tcp = n % 3 != 0;
            let bytes = flow(([10, 0, 0, n as u8], 1000 + n), ([10, 0, 1, 1], 80), is_tcp, &[n as u8; 900]);
            let packet = Packet::parse(&bytes, bytes.len()).unwrap();
            let hash = hasher.report(&packet, &packet.layers());
            let queue = table[hash.value as usize % 16];
            expect(&mut guest, usize::from(n % 4), &bytes, (hash.value, hash.kind), queue.into());
        }
        // What is cut up stays together; only addresses are hashed from here on.
        assert_eq!(guest.command(&rss(hash_types::IPV4, &[1, 3], 0)), 0);
        expect(&mut guest, 1, &known, (0x323e_8fc2, 1), 1);
        // Queues by number again, and without a hash.
        assert_eq!(guest.command(&[4, 0, 1, 0]), 0);
        expect(&mut guest, 3, &known, (0, 0), 0);
        guest.check_memory(2);
    }
}

#[test]
fn segments_have_their_packets_hash() {
    let back = Back::start(&["", ""], 2, 2);
    let mut sender = back.guest_with(0, 2, MRG_RXBUF | MQ | CSUM | HOST_TSO4);
    let mut guest = back.guest_with(1, 2, PLAIN | MQ | RSS | HASH_REPORT);
    let hash_config = [&[4, 2][..], &hash_types::ALL.to_le_bytes(), &[0; 8], &[40], &KEY].concat();
    for (command, queues) in [(rss(hash_types::ALL, &[1], 0), [1, 1]), (hash_config, [0, 1])] {
        // The second one is of hashes alone.
        assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
        let transmit = command.len() - KEY.len() - 3;
        let mut command = command;
        if command[1] == 1 {
            command[transmit..transmit + 2].copy_from_slice(&2u16.to_le_bytes());
        }
        assert_eq!(guest.command(&command), 0);
        for (pair, queue) in queues.into_iter().enumerate() {
            let bytes = partial(&[pair as u8; 5000]);
            let packet = Packet::parse(&bytes, bytes.len()).unwrap();
            let hash = Hasher::new(hash_types::ALL, &KEY).report(&packet, &packet.layers());
            assert_eq!(hash.kind, 2);
            sender.send_raw(pair, &with(header(1400), &bytes));
            assert_eq!(guest.await_frames_and_headers(4).concat().len(), bytes.len() + 3 * 54);
            for _ in 0..4 {
                assert_eq!(last(&mut guest), (hash.value, hash.kind, queue));
            }
        }
    }
}

/// A receiver with queues on one reactor has packets from another one.
#[test]
fn what_crosses_reactors_is_filtered_and_hashed_there() {
    let back = Back::start(&["", ""], 2, 2);
    let mut sender = back.guest_with(0, 2, MRG_RXBUF);
    let mut guest = back.guest_with(1, 1, PLAIN | HASH_REPORT);
    let hash_config = [&[4, 2][..], &hash_types::ALL.to_le_bytes(), &[0; 8], &[40], &KEY].concat();
    assert_eq!((guest.command(&hash_config), guest.command(&[0, 0, 0])), (0, 0));
    let known = flow(([66, 9, 149, 187], 2794), ([161, 142, 100, 80], 1766), true, &[7; 1200]);
    for pair in [1, 0, 1] {
        sender.send(pair, &frame(MacAddr([2; 6]), mac(0), None, 1, 60));
        sender.send(pair, &known);
        assert_eq!(guest.await_frames_and_headers(1), std::slice::from_ref(&known));
        assert_eq!(last(&mut guest), (0x51cc_c178, 2, 0));
    }
    assert_eq!(filtered(&back, 1), 3);
}

#[test]
fn offloads_can_be_taken_back_and_given_again() {
    let back = Back::start(&["", ""], 1, 1);
    let mut sender = back.guest_with(0, 1, MRG_RXBUF | CSUM | HOST_TSO4);
    let mut guest = back.guest_with(1, 1, PLAIN | GUEST_CSUM | GUEST_TSO4);
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    let large = partial(&[1; 5000]);
    let mut send = || sender.send_raw(0, &with(header(1400), &large));
    for _ in 0..2 {
        send();
        assert_eq!(guest.await_offload().1, large);
        assert_eq!(guest.command(&set(GUEST_CSUM)), 0);
        send();
        assert_eq!(guest.await_frames(4).concat().len(), large.len() + 3 * 54);
        assert_eq!(guest.command(&set(1 << 8)), 1, "not negotiated");
        assert_eq!(guest.command(&set(GUEST_CSUM | GUEST_TSO4)), 0);
    }
}

#[test]
fn a_guest_is_asked_to_announce_itself_until_it_has() {
    let back = Back::start(&["", ""], 1, 1);
    let mut guest = back.guest_with(0, 1, PLAIN);
    let mut other = back.guest(1, 1);
    negotiate(&mut guest);
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(guest.peer.ack(21, &[], &[theirs.as_raw_fd()]));
    let status = |guest: &mut Guest| guest.peer.ask(24, &[words(&[0, 8, 0]), vec![0; 8]].concat())[12 + 6];
    assert_eq!(status(&mut guest), 1);
    assert!(guest.peer.ack(19, &[&mac(0).0[..], &[0; 2]].concat(), &[]));
    assert!(readable_within(&ours, 10_000), "a notice");
    assert_eq!(status(&mut guest), 1 | 2, "VIRTIO_NET_S_ANNOUNCE");
    assert_eq!(guest.command(&[3, 0]), 0);
    assert_eq!(status(&mut guest), 1);
    expect_nothing(&mut other);
}

/// Whatever a driver says: it is told that it is wrong, that is counted, and all is as it was.
#[test]
fn commands_that_are_wrong_are_answered_and_counted() {
    let back = Back::start(&["", ""], 2, 1);
    let mut guests = [back.guest(0, 1), back.guest_with(1, 2, PLAIN | MQ | RSS)];
    learn(&mut guests);
    let [sender, guest] = &mut guests;
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    let mut many = rss(hash_types::ALL, &[0; 128], 0);
    many.splice(6..8, 255u16.to_le_bytes());
    let wrong: [Vec<u8>; 16] = [
        vec![0],
        vec![0, 0],
        vec![0, 0, 7],
        vec![0, 0, 1, 1],
        vec![9, 0, 0],
        vec![0, 99, 1],
        vec![1, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3],
        vec![1, 1, 1, 2],
        vec![2, 0, 0xff, 0x0f],
        vec![2, 0, 0xff, 0xff],
        vec![4, 0, 3, 0],
        many,
        rss(hash_types::ALL, &[2], 0),
        rss(1 << 20, &[0], 0),
        // Longer than any.
        [&[1, 0][..], &3000u32.to_le_bytes(), &vec![2; 18_000], &[0; 4]].concat(),
        vec![0xff; 3],
    ];
    for bytes in &wrong {
        assert_eq!(guest.command(bytes), 1, "{:x?}", &bytes[..bytes.len().min(12)]);
    }
    // In pieces of any length, with room for more of an answer than there is, and with none.
    assert_eq!(guest.command_in(&[1, 1, 1], &[0, 0, 0], 2), 0);
    assert_eq!(guest.command_in(&[3], &[0, 0, 1], 0), 0xee);
    assert_eq!(back.errors(1, 4), wrong.len() as u64 + 1);
    sender.send(0, &frame(MacAddr([2; 6]), mac(0), None, 0, 60));
    sender.send(0, &frame(mac(1), mac(0), None, 0, 60));
    assert_eq!(guest.await_frames(1).len(), 1, "the filter is as it was");
    guest.check_memory(2);
}
