//! What a capture has of a switch's ports is what their guests have sent and got.

use std::fs::File;
use std::path::Path;

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use vhost_net::captured::{Captured, Wish};
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::pcap::{Capture, CaptureConfig};

use crate::guest::{Back, Guest, mac};
use crate::offload::{header, partial, with};

/// Frames of each interface, outbound and inbound, with their flags.
type Seen = Vec<[Vec<(u32, Vec<u8>)>; 2]>;

fn read(path: &Path, interfaces: usize) -> Seen {
    let mut seen: Seen = vec![Default::default(); interfaces];
    let mut reader = PcapNgReader::new(File::open(path).unwrap()).unwrap();
    while let Some(block) = reader.next_block() {
        let Block::EnhancedPacket(packet) = block.unwrap() else { continue };
        let flags = packet.options.iter().find_map(|o| match o {
            EnhancedPacketOption::Flags(flags) => Some(*flags),
            _ => None,
        });
        let flags = flags.unwrap();
        // Bits 0 and 1: 1 is inbound, 2 outbound.
        let way = usize::from(flags & 3 == 1);
        seen[packet.interface_id as usize][way].push((flags >> 9, packet.data.to_vec()));
    }
    seen
}

fn frame(to: usize, from: usize, fill: u8, len: usize) -> Vec<u8> {
    let mut frame = [mac(to).0, mac(from).0].concat();
    frame.extend([0x88, 0xb5]);
    frame.resize(len, fill);
    frame
}

fn got(guest: &mut Guest, count: usize, into: &mut Vec<(u32, Vec<u8>)>) {
    for _ in 0..count {
        let (header, bytes) = guest.await_offload();
        let flags = u32::from(header.flags & 1) | u32::from(header.gso_type != 0) << 2;
        into.push((flags, bytes));
    }
}

#[test]
fn a_capture_is_what_guests_have_sent_and_got() {
    for (reactors, pairs) in [(1, 1), (2, 2)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let capture = Capture::create(&path, &["a", "b", "c"], CaptureConfig::default()).unwrap();
        capture.keep();
        let back = Back::start_captured(&["", "", ""], pairs, reactors, None, Some(&capture));
        let all = MRG_RXBUF | CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4;
        let mut a = back.guest_with(0, pairs, all);
        let mut b = back.guest_with(1, pairs, all);
        let mut c = back.guest_with(2, pairs, MRG_RXBUF);
        let (mut sent, mut received) = (vec![], [vec![], vec![]]);
        // Everybody knows b and c.
        for guest in [&mut b, &mut c] {
            let mut hello = frame(0, guest.at, 7, 60);
            hello[..6].fill(0xff);
            guest.send(0, &hello);
        }
        let mut first = vec![];
        got(&mut a, 2, &mut first);
        got(&mut c, 1, &mut received[1]);
        got(&mut b, 1, &mut received[0]);
        // Runs of plain frames, of all lengths; then what is cut up for one and not for the other.
        for round in 0..40u8 {
            let to = 1 + usize::from(round / 7 % 2);
            let out = frame(to, 0, round, 60 + 37 * usize::from(round));
            a.send(0, &out);
            sent.push((0, out));
            got(if to == 1 { &mut b } else { &mut c }, 1, &mut received[to - 1]);
        }
        for (to, pieces) in [(1, 1), (2, 4)] {
            let mut out = partial(&[3; 5000]);
            out[..6].copy_from_slice(&mac(to).0);
            a.send_raw(0, &with(header(1400), &out));
            sent.push((5, out));
            got(if to == 1 { &mut b } else { &mut c }, pieces, &mut received[to - 1]);
        }
        drop(back);
        drop(capture);
        let seen = read(&path, 3);
        assert!(seen[0][0] == sent, "{} sent, {} captured", sent.len(), seen[0][0].len());
        let mut hellos = seen[0][1].clone();
        hellos.sort();
        first.sort();
        assert!(hellos == first, "{} received, {} captured", first.len(), hellos.len());
        for (port, received) in [(1, &received[0]), (2, &received[1])] {
            assert!(seen[port][1] == *received, "{} got, {} captured", received.len(), seen[port][1].len());
            assert_eq!(seen[port][0].len(), 1);
        }
        assert!(received[1].iter().skip(1).all(|(flags, bytes)| *flags == 0 && bytes.len() <= 1514 + 40));
    }
}

/// One that begins and ends while guests talk, and meets a port that was not there when it began.
#[test]
fn a_capture_comes_and_goes_and_has_ports_that_come_meanwhile() {
    for reactors in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("capture");
        let mut back = Back::start(&["", ""], 2, reactors);
        let (mut a, mut b) = (back.guest(0, 2), back.guest(1, 2));
        let hello = |a: &mut Guest, b: &mut Guest, fill: u8| {
            let mut hello = frame(0, 0, fill, 70);
            hello[..6].fill(0xff);
            a.send(usize::from(fill) % 2, &hello);
            assert_eq!(b.await_frames(1), [hello.as_slice()]);
            hello
        };
        hello(&mut a, &mut b, 1);
        let wish = Wish { file: path.clone(), config: CaptureConfig::default() };
        let ports = [("a".to_owned(), Some((None, 0))), ("b".to_owned(), Some((None, 1)))];
        let mut captured = Captured::begin(wish, ports.into_iter()).unwrap();
        captured.capture().keep();
        captured.witness(&back.hub, back.engine()).unwrap();
        let mut expected = vec![hello(&mut a, &mut b, 2), hello(&mut a, &mut b, 3)];
        let at = back.add("");
        captured.joins((None, at as u16), captured.capture().add("c"));
        captured.witness(&back.hub, back.engine()).unwrap();
        let mut c = back.guest(at, 2);
        expected.push(hello(&mut a, &mut b, 4));
        let last = [expected[2].clone()];
        assert_eq!(c.await_frames(1), last);
        Captured::nobody(&back.hub, back.engine()).unwrap();
        drop(captured);
        let seen = read(&path, 3);
        hello(&mut a, &mut b, 5);
        let frames =
            |seen: &[(u32, Vec<u8>)]| seen.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>();
        assert_eq!((frames(&seen[0][0]), frames(&seen[1][1])), (expected.clone(), expected));
        assert_eq!(frames(&seen[2][1]), last);
        let now = read(&path, 3);
        assert_eq!(now, seen, "it is whole, and nobody writes to it any more");
    }
}
