//! AF_XDP sockets.

use std::time::{Duration, Instant};

use vhost_net::header::{F_NEEDS_CSUM, VnetHdr};
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::af_xdp::AfXdp;
use vhost_net::port::{Link, Refused, Uplink};

use super::Test;
use super::pair::{drop_rights, frame, ip, is_quiet, make, receive, send, until};

pub const TESTS: &[Test] = &[
    ("af_xdp::frames_cross_both_ways_as_they_are", frames_cross_both_ways_as_they_are),
    ("af_xdp::frames_go_round_and_round_the_shared_memory", frames_go_round_and_round_the_shared_memory),
    ("af_xdp::frames_that_it_does_not_take_are_counted", frames_that_it_does_not_take_are_counted),
    ("af_xdp::an_interface_may_go_and_come_back", an_interface_may_go_and_come_back),
    ("af_xdp::what_is_wrong_is_said_with_the_way_out", what_is_wrong_is_said_with_the_way_out),
];

const PLAIN: VnetHdr =
    VnetHdr { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, num_buffers: 0 };

fn frames_cross_both_ways_as_they_are() {
    make();
    let mut near = AfXdp::open("near", 0).unwrap();
    let mut far = AfPacket::open("far").unwrap();
    // A pair of virtual interfaces has none.
    assert!(!near.is_zero_copy());
    let lens = [14, 60, 64, 200, 1514, 1000].into_iter().cycle().take(300);
    let sent: Vec<Vec<u8>> = lens.enumerate().map(|(i, len)| frame(len, i)).collect();
    let mut seen = [Vec::new(), Vec::new()];
    for (at, frames) in sent.chunks(50).enumerate() {
        for frame in frames {
            send(&mut near, &PLAIN, frame, 64, 1 + at * 37).unwrap();
            send(&mut far, &PLAIN, frame, 14, 400).unwrap();
        }
        near.flush();
        far.flush();
        seen[0].extend(receive(&mut near, frames.len()));
        seen[1].extend(receive(&mut far, frames.len()));
    }
    for seen in &seen {
        assert_eq!(seen.len(), sent.len());
        assert!(seen.iter().map(|(_, frame)| frame).eq(&sent), "frames differ, or their order does");
    }
    let bytes = sent.iter().map(Vec::len).sum::<usize>() as u64;
    let counters = near.counters();
    assert_eq!((counters.rx_packets, counters.rx_bytes, counters.rx_missed_errors), (300, bytes, 0));
    assert_eq!((counters.tx_packets, counters.tx_bytes), (300, bytes));
}

/// More than three times as many as there is room for, each way.
fn frames_go_round_and_round_the_shared_memory() {
    make();
    let mut near = AfXdp::open("near", 0).unwrap();
    let mut far = AfXdp::open("far", 0).unwrap();
    let count = 15_000;
    let (mut sent, mut number) = ([0, 0], [0, 0]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while number != [count, count] {
        assert!(Instant::now() < deadline, "{number:?} of {sent:?} came");
        for (at, port) in [&mut near, &mut far].into_iter().enumerate() {
            for _ in 0..64 {
                if sent[at] < count
                    && port.send(&PLAIN, 100, &frame(100, sent[at]), &mut std::iter::empty()).is_ok()
                {
                    sent[at] += 1;
                }
            }
            port.flush();
            let number = &mut number[1 - at];
            port.receive(200, &mut |_, seen| {
                assert!(seen == frame(100, *number), "not frame {number}");
                *number += 1;
            });
        }
    }
    assert_eq!(near.counters().rx_missed_errors + far.counters().rx_missed_errors, 0);
}

fn frames_that_it_does_not_take_are_counted() {
    make();
    let mut near = AfXdp::open("near", 0).unwrap();
    assert_eq!(near.takes(), 0);
    let partial = VnetHdr { flags: F_NEEDS_CSUM, ..PLAIN };
    assert_eq!(send(&mut near, &partial, &frame(100, 1), 64, 100), Err(Refused::Bad));
    let segments = VnetHdr { gso_type: 1, ..PLAIN };
    assert_eq!(send(&mut near, &segments, &frame(100, 1), 64, 100), Err(Refused::Bad));
    assert_eq!(send(&mut near, &PLAIN, &frame(4000, 1), 64, 100), Err(Refused::TooLong));
    // Nothing has gone, and nothing is lost: there is as much room as before.
    for i in 0..5000 {
        assert_eq!(near.send(&PLAIN, 4000, &frame(4000, i), &mut std::iter::empty()), Err(Refused::TooLong));
    }
    send(&mut near, &PLAIN, &frame(1514, 1), 64, 100).unwrap();
    let counters = near.counters();
    assert_eq!((counters.tx_packets, counters.tx_errors, counters.tx_length_errors), (1, 2, 5001));
}

fn an_interface_may_go_and_come_back() {
    make();
    let mut near = AfXdp::open("near", 0).unwrap();
    until(|| near.link() == Link { up: true, mtu: 1500 });
    ip("link set far down");
    until(|| !near.link().up);
    ip("link del near");
    assert!(!near.link().up);
    assert!(is_quiet(&mut near));
    assert_eq!(send(&mut near, &PLAIN, &frame(100, 1), 64, 100), Err(Refused::Down));
    make();
    until(|| near.link().up);
    let mut far = AfPacket::open("far").unwrap();
    send(&mut far, &PLAIN, &frame(100, 1), 14, 50).unwrap();
    far.flush();
    assert_eq!(receive(&mut near, 1).len(), 1);
    assert_eq!(near.counters().tx_carrier_errors, 1, "what was counted stays");
}

fn what_is_wrong_is_said_with_the_way_out() {
    make();
    let says = |name: &str, queue: u32, what: &str| match AfXdp::open(name, queue) {
        Ok(_) => panic!("{name} was opened"),
        Err(why) => assert!(why.to_string().contains(what), "{why}"),
    };
    says("nowhere", 0, "ip link");
    says("near", 77, "use a packet socket");
    let first = AfXdp::open("near", 0).unwrap();
    says("near", 0, "another XDP program");
    drop(first);
    ip("link set near mtu 9000");
    ip("link set far mtu 9000");
    match AfXdp::open("near", 0) {
        // Some kernels take it, behind the driver.
        Ok(_) => {}
        Err(why) => assert!(why.to_string().contains("MTU"), "{why}"),
    }
    ip("link set near down");
    says("near", 0, "`ip link set near up`");
    ip("link set near up");
    drop_rights();
    says("near", 0, "CAP_NET_RAW");
}
