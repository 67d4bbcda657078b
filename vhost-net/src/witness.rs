//! What the station on one reactor notes of its ports' packets for a [capture](crate::pcap), if there is one.

use poll_engine::ring::chain::ChainView;

use crate::header::{HEADER, VnetHdr};
use crate::pcap::{Direction, Probe};
use crate::tx::Head;

/// Who notes packets, or nobody.
#[derive(Debug, Default)]
pub struct Witness(Option<Box<Noting>>);

#[derive(Debug)]
struct Noting {
    probe: Probe,
    /// The capture's numbers of the ports.
    interfaces: Vec<u32>,
}

impl Witness {
    /// Notes packets of the ports, which have these numbers in the capture.
    pub fn new(probe: Probe, interfaces: Vec<u32>) -> Witness {
        Witness(Some(Box::new(Noting { probe, interfaces })))
    }

    /// Whether there is a capture.
    #[inline]
    pub fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// What a guest has sent, in its chain behind a header of so many bytes.
    #[cold]
    pub fn sent(&mut self, port: usize, chain: &ChainView<'_>, header: usize) {
        let len = chain.readable_len() as usize;
        let mut bytes = [0; HEADER];
        chain.readable(0, HEADER as u32).read(&mut bytes);
        let read =
            |at: usize, into: &mut [u8]| chain.readable((header + at) as u32, into.len() as u32).read(into);
        let vnet = VnetHdr::from_bytes(&bytes);
        self.note(port, Direction::Outbound, &vnet, len.saturating_sub(header), read);
    }

    /// What a guest has got in one buffer, a packet of `len` bytes that asks for nothing.
    #[cold]
    pub fn received(&mut self, port: usize, chain: &ChainView<'_>, len: u32) {
        let read =
            |at: usize, into: &mut [u8]| chain.writable((HEADER + at) as u32, into.len() as u32).read(into);
        self.note(port, Direction::Inbound, &VnetHdr::default(), len as usize, read);
    }

    /// A packet for a port, whose head is ours, and of which the rest is in the sender's chain, from byte `behind` on.
    #[inline]
    pub fn forwarded(&mut self, port: usize, head: &Head, behind: u32, read: &dyn Fn(u32, &mut [u8])) {
        if self.is_there() {
            self.note_forwarded(port, head, behind, read);
        }
    }

    #[cold]
    fn note_forwarded(&mut self, port: usize, head: &Head, behind: u32, read: &dyn Fn(u32, &mut [u8])) {
        let vnet = if head.is_plain() { VnetHdr::default() } else { head.vnet() };
        let read = |at: usize, into: &mut [u8]| {
            let own = head.packet().get(at..).unwrap_or_default();
            let (first, rest) = into.split_at_mut(own.len().min(into.len()));
            first.copy_from_slice(&own[..first.len()]);
            if !rest.is_empty() {
                read(behind + (at + first.len() - head.packet().len()) as u32, rest);
            }
            into.len()
        };
        self.note(port, Direction::Inbound, &vnet, head.packet_len() as usize, read);
    }

    /// What has come in from outside.
    #[inline]
    pub fn came_in(&mut self, port: usize, header: &VnetHdr, frame: &[u8]) {
        if self.is_there() {
            let read = |at: usize, into: &mut [u8]| {
                let from = frame.get(at..).unwrap_or_default();
                let n = from.len().min(into.len());
                into[..n].copy_from_slice(&from[..n]);
                n
            };
            self.note(port, Direction::Outbound, header, frame.len(), read);
        }
    }

    fn note(
        &mut self,
        port: usize,
        direction: Direction,
        header: &VnetHdr,
        len: usize,
        read: impl Fn(usize, &mut [u8]) -> usize,
    ) {
        let Some(Noting { probe, interfaces }) = self.0.as_deref_mut() else { return };
        if let Some(&interface) = interfaces.get(port) {
            probe.note_of(interface, direction, header, len, read);
        }
    }
}
