//! What a guest says of a frame, and the frame: nothing panics, nothing is read outside, and what is believed holds.
//!
//! Input: a virtio-net header of 12 bytes, feature bits of 8, and the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_net::features::CSUM;
use vhost_net::header::{Gso, Offload, Segmenting, VnetHdr};
use vhost_net::offload::{Beginning, Sum, complete, segment};
use vhost_net::packet::{ETHERTYPE_VLAN, PEEK, Packet, Tag};
use vhost_net::rss::{Hasher, Rss, hash_types};

fuzz_target!(|data: &[u8]| {
    let _ = Hasher::from_hash_config(data);
    let _ = Rss::from_rss_config(data, 4);
    let Some((header, rest)) = data.split_first_chunk::<12>() else { return };
    let Some((features, frame)) = rest.split_first_chunk::<8>() else { return };
    let (header, features) = (VnetHdr::from_bytes(header), u64::from_le_bytes(*features));
    let head = &frame[..frame.len().min(PEEK)];
    let Ok(packet) = Packet::parse(head, frame.len()) else { return };
    let layers = packet.layers();
    assert!(usize::from(layers.transport) <= head.len());
    let _ = (packet.arp(), packet.neighbour(&layers), packet.ports(&layers), packet.tag());
    let _ = Hasher::new(hash_types::ALL, &[7; 40]).report(&packet, &layers);
    let read = |at: usize, into: &mut [u8]| {
        assert!(at >= head.len(), "the first bytes are not read again");
        into.copy_from_slice(&frame[at..at + into.len()]);
    };

    // Segments of a frame that nobody has checked are none, or inside of it.
    let [low, high] = [header.csum_start, header.gso_size];
    for kind in [Segmenting::Tcp4, Segmenting::Tcp6, Segmenting::Udp4, Segmenting::Udp6] {
        let gso = Gso { kind, size: high, ecn: false, header_len: layers.payload.unwrap_or(low) };
        if frame.len() / usize::from(high.max(1)) < 1000 {
            let _ = segment(&packet, gso, read, |headers, payload| {
                assert!(headers.len() == usize::from(gso.header_len) && payload.end <= frame.len());
            });
        }
    }

    let Ok(offload) = header.check(&packet, features) else { return };
    // What is handed on is believed again, and means the same.
    assert_eq!(offload.header().check(&packet, features), Ok(offload));
    let tag = Tag { tpid: ETHERTYPE_VLAN, tci: high };
    let push = Beginning::push(&packet, tag);
    let tagged = [push.bytes(), &frame[push.skip()..]].concat();
    let moved = push.offload(offload);
    let packet_of = Packet::parse(&tagged[..tagged.len().min(PEEK)], tagged.len());
    if let Ok(tagged) = packet_of {
        assert_eq!(tagged.tag(), Some(tag));
        assert_eq!(Beginning::pop(&tagged).offload(moved), offload);
    }

    let Offload { csum: Some(csum), gso } = offload else {
        assert_eq!(offload.gso, None);
        return;
    };
    assert!(features & CSUM != 0 && csum.start >= layers.transport);
    let mut completed = frame.to_vec();
    let sum = complete(&packet, csum, read);
    completed[csum.place()..csum.place() + 2].copy_from_slice(&sum.to_be_bytes());
    if csum.offset % 2 == 0 {
        // Together with what it stood for, the checksum makes the sum all ones: that is what a receiver looks for.
        let mut whole = Sum::default();
        whole.add(&frame[csum.place()..csum.place() + 2]);
        whole.add(&completed[csum.start.into()..]);
        assert!(matches!(whole.folded(), 0xffff | 0));
    }

    let Some(gso) = gso else { return };
    let mut at = usize::from(gso.header_len);
    segment(&packet, gso, read, |headers, payload| {
        assert_eq!((headers.len(), payload.start), (usize::from(gso.header_len), at));
        assert!(payload.len() <= usize::from(gso.size));
        at = payload.end;
    })
    .expect("what was checked can be cut");
    assert_eq!(at, frame.len());
});
