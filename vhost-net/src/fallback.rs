//! What a receiver does not take is done before it gets the packet: the checksum, or cutting it into segments.

use poll_engine::engine::queue::Queue;

use crate::header::{Offload, Work};
use crate::offload::{complete, segment};
use crate::packet::Packet;
use crate::rx::{Form, Refused, Sent, Spread, deliver};
use crate::tx::Head;

/// What came of a packet that was not handed on as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Packets that the receiver got, and their bytes.
    pub packets: u64,
    /// See above.
    pub bytes: u64,
    /// Packets that it did not get, and why the first of them.
    pub refused: u64,
    /// See above.
    pub why: Option<Refused>,
}

impl Outcome {
    /// Of one packet.
    pub fn of(bytes: u32, delivered: Result<(), Refused>) -> Outcome {
        let mut outcome = Outcome::default();
        outcome.count(bytes, delivered);
        outcome
    }

    fn count(&mut self, bytes: u32, delivered: Result<(), Refused>) {
        match delivered {
            Ok(()) => {
                self.packets += 1;
                self.bytes += u64::from(bytes);
            }
            Err(refused) => {
                self.refused += 1;
                self.why.get_or_insert(refused);
            }
        }
    }
}

/// Whether a receiver with these features takes the packet as it is.
#[inline]
pub fn takes(head: &Head, features: u64) -> bool {
    head.is_plain() || head.offload().work(features) == Work::Nothing
}

/// Puts a packet into receive buffers in the form that a driver with these features takes. `None` if there is no such form:
/// its header was not what the packet has. What the receiver has got is told to `got`: a head, and where in the sender's
/// chain the rest is.
#[cold]
#[allow(clippy::too_many_arguments)] // parts of whoever calls
pub fn deliver_softened(
    rx: &mut Queue,
    (form, features): (Form, u64),
    head: &mut Head,
    piece: &mut Head,
    sent: &(impl Sent + ?Sized),
    read: impl Fn(u32, &mut [u8]),
    spread: &mut Spread,
    mut got: impl FnMut(&Head, u32),
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    let Offload { csum, gso } = *head.offload();
    let packet = Packet::parse(head.packet(), head.packet_len() as usize).ok()?;
    // What is behind the head's copy.
    let read = |at: usize, into: &mut [u8]| {
        // A driver that takes the bytes away while they are read gets a wrong checksum.
        read(head.in_chain(at), into);
    };
    match (head.offload().work(features), gso) {
        (Work::Segment, Some(gso)) => {
            segment(&packet, gso, read, |headers, payload| {
                // Nothing follows what did not fit: the sender sends the rest again in any case.
                if outcome.why.is_some() {
                    outcome.refused += 1;
                    return;
                }
                piece.begin(headers, payload.len() as u32);
                let behind = head.in_chain(payload.start);
                let rest = sent.part(behind, payload.len() as u32);
                let delivered = deliver(rx, form, piece, rest, spread);
                outcome.count(piece.packet_len(), delivered);
                if delivered.is_ok() {
                    got(piece, behind);
                }
            })?;
        }
        (Work::Checksum, _) => {
            let csum = csum?;
            let sum = complete(&packet, csum, read);
            head.packet_mut().get_mut(csum.place()..csum.place() + 2)?.copy_from_slice(&sum.to_be_bytes());
            head.set_offload(Offload::default());
            let (bytes, rest) = (head.packet_len(), sent.part(head.read(), u32::MAX));
            outcome.count(bytes, deliver(rx, form, head, rest, spread));
            if outcome.packets > 0 {
                got(head, head.read());
            }
        }
        _ => return None,
    }
    Some(outcome)
}
