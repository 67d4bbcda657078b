//! A station says where it is: what a guest that has migrated does not do by itself is done for it, so that frames for it
//! come to its new port.

use std::sync::PoisonError;

use crate::header::VnetHdr;
use crate::hub::Hub;
use crate::mac::MacAddr;
use crate::switch::{Frame, PortId, Verdict};
use crate::tx::Head;

/// The shortest frame that Ethernet has, without its checksum.
pub const LEN: usize = 60;

/// A frame to all that asks for the IP address of `mac` (RFC 903), which is what QEMU sends for such guests: nobody answers,
/// and every switch on the way learns where it comes from.
pub fn announcement(mac: MacAddr) -> [u8; LEN] {
    // Ethernet, IPv4, lengths of both addresses, request reverse.
    const RARP: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    let mut frame = [0; LEN];
    frame[..6].copy_from_slice(&MacAddr::BROADCAST.0);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..22].copy_from_slice(&RARP);
    // Both hardware addresses; the IP addresses are zero.
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}

impl Hub {
    /// Announces a station behind a port of the switch, as by a frame from there: by the same rules.
    pub fn announce(&self, port: usize, mac: MacAddr) {
        let Some(switch) = &self.switch else { return };
        let _alone = self.announcing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut shard = switch.outsider();
        let (frame, now) = (announcement(mac), self.now());
        let mut head = Head::new();
        if head.take_frame(&VnetHdr::default(), &frame).is_err() {
            return;
        }
        let verdict = shard.decide(PortId(port as u16), &Frame::whole(&frame, LEN as u32), now);
        let Verdict::Flood(flood) = verdict else { return };
        let (ports, seats) = (self.ports(), self.seats());
        for (to, action) in shard.egress(flood, now) {
            let mut head = head.clone();
            head.retag(action);
            let Some(port) = ports.get(usize::from(to.0)) else { continue };
            if let Some(chute) = seats.way_to(port) {
                // When too many are on their way: QEMU says it several times.
                chute.send_frame((to.0.into(), port), 0, &head, &frame);
            }
        }
    }
}
