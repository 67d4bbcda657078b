//! The network device's face to the engine: features, configuration space, queues (virtio 1.3, 5.1.2 to 5.1.4).

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use poll_engine::device::{ConfigRefused, Device, Network, QueueHandler, StateRefused};
use poll_engine::engine::wanted::WantedOn;
use poll_engine::ring::inflight::Memento;

use crate::control;
use crate::control_queue::{ControlQueue, Controlled};
use crate::features::{
    CSUM, GUEST_ANNOUNCE, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN,
    HOST_TSO4, HOST_TSO6, HOST_USO, MAC, MQ, MRG_RXBUF, MTU, STATUS,
};
use crate::hub::{Hub, Member, Plan};
use crate::mac::MacAddr;
use crate::pcap::Capture;
use crate::port::tap::card::TapCard;
use crate::rss::{KEY, TABLE, hash_types};

/// Bytes of `struct virtio_net_config`.
pub const CONFIG_LEN: usize = 24;
/// Most pairs of queues that are offered.
pub const MAX_PAIRS: u16 = 16;
/// The smallest and the largest MTU (5.1.4.1; a packet of 64 KiB with its Ethernet header).
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65521;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`.
const ANNOUNCE: u16 = 2;

/// What drivers may leave to us, and we to them: what the receiver does not take is done by us.
const OFFLOADS: u64 = CSUM
    | GUEST_CSUM
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | HOST_USO
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | GUEST_USO4
    | GUEST_USO6;

/// What a network card says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its address; without one the driver makes one up, or the front end has one.
    pub mac: Option<[u8; 6]>,
    /// The MTU that it advises.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub pairs: u16,
    /// Largest ring.
    pub ring_size: u16,
}

/// What a card is joined to.
#[derive(Debug)]
pub enum Joined {
    /// A port of a hub, by its number.
    Hub(Arc<Hub>, usize),
    /// A tap of its own.
    Tap(TapCard),
}

/// A network card offered as a virtio device.
pub struct NetDevice {
    card: Card,
    joined: Joined,
    /// If there can be a control queue.
    controlled: Option<Arc<Controlled>>,
    /// Has the driver read configuration space again.
    on_change: OnceLock<Box<dyn Fn() + Send + Sync>>,
    withheld: u64,
    told_link: AtomicBool,
    /// Features of the queues that were started last; 0: none was.
    started: AtomicU64,
    wanted_on: WantedOn,
}

impl NetDevice {
    /// A card, without these features of the engine.
    pub fn new(card: Card, joined: Joined, withheld: u64) -> NetDevice {
        let controlled = match &joined {
            Joined::Hub(hub, port) if matches!(hub.plan, Plan::Switch | Plan::Wire | Plan::Echo) => {
                Some(Arc::new(Controlled::new(Arc::clone(hub), *port, card.pairs)))
            }
            // What comes from a tap or from nowhere is not looked at on its way.
            _ => None,
        };
        let (told_link, started) = (AtomicBool::new(true), AtomicU64::new(0));
        let (on_change, wanted_on) = (OnceLock::new(), WantedOn::default());
        NetDevice { card, joined, controlled, on_change, withheld, told_link, started, wanted_on }
    }

    /// Has the front end told by this that configuration space has changed. The first one given counts.
    pub fn on_change(&self, act: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(act));
    }

    /// Has these queues on this reactor when they start next.
    pub fn want_on(&self, queues: Range<u16>, reactor: usize) {
        self.wanted_on.set(queues, reactor);
    }

    /// Has what crosses a tap of its own noted there from now on, by queues that start.
    pub fn set_capture(&self, capture: Option<(Arc<Capture>, u32)>) {
        if let Joined::Tap(card) = &self.joined {
            card.set_capture(capture);
        }
    }

    fn is_up(&self) -> bool {
        match &self.joined {
            Joined::Hub(hub, port) => hub.port(*port).link.load(Ordering::Relaxed),
            Joined::Tap(card) => card.is_up(),
        }
    }

    /// Sets the link up or down; true if the guest has to be told.
    pub fn set_link(&self, up: bool) -> io::Result<bool> {
        match &self.joined {
            Joined::Hub(hub, port) => hub.set_link(*port, up),
            Joined::Tap(card) => card.set_link(up)?,
        }
        Ok(self.told_link.swap(up, Ordering::Relaxed) != up)
    }

    /// 5.1.4: mac, status, max_virtqueue_pairs, mtu, speed, duplex, rss_max_key_size, rss_max_indirection_table_length,
    /// supported_hash_types.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut c = [0; CONFIG_LEN];
        let said = |controlled: &Arc<Controlled>| controlled.look(|c| c.map(|c| (c.mac, c.announcing)));
        let asked = self.controlled.as_ref().and_then(said);
        let (mac, announcing) = asked.unwrap_or((self.card.mac, false));
        let link = if self.is_up() { LINK_UP } else { 0 };
        c[..6].copy_from_slice(&mac.unwrap_or_default());
        c[6..8].copy_from_slice(&(link | if announcing { ANNOUNCE } else { 0 }).to_le_bytes());
        c[8..10].copy_from_slice(&self.card.pairs.to_le_bytes());
        c[10..12].copy_from_slice(&self.card.mtu.unwrap_or_default().to_le_bytes());
        if self.controlled.is_some() {
            c[17] = KEY as u8;
            c[18..20].copy_from_slice(&(TABLE as u16).to_le_bytes());
            c[20..24].copy_from_slice(&hash_types::ALL.to_le_bytes());
        }
        c
    }
}

impl std::fmt::Debug for NetDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetDevice").field("card", &self.card).finish_non_exhaustive()
    }
}

impl Device for NetDevice {
    fn features(&self) -> u64 {
        let mac = if self.card.mac.is_some() { MAC } else { 0 };
        let mtu = if self.card.mtu.is_some() { MTU } else { 0 };
        let mq = if self.card.pairs > 1 { MQ } else { 0 };
        let joined = match &self.joined {
            Joined::Hub(..) => MRG_RXBUF | OFFLOADS,
            Joined::Tap(card) => card.tap().features(),
        };
        // A front end that keeps the control queue to itself (QEMU) takes of these what it has a use for.
        let controlled = if self.controlled.is_some() { control::FEATURES } else { 0 };
        joined | STATUS | mq | mac | mtu | controlled
    }

    fn completes_in_order(&self) -> bool {
        // What is taken is copied and given back, or stays.
        true
    }

    fn withheld_features(&self) -> u64 {
        self.withheld
    }

    fn num_queues(&self) -> u16 {
        2 * self.card.pairs + u16::from(self.controlled.is_some())
    }

    fn max_ring_size(&self) -> u16 {
        self.card.ring_size
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let config = self.config();
        let from = config.get(offset as usize..).unwrap_or_default();
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        into[n..].fill(0);
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused { offset, end: offset.saturating_add(bytes.len() as u32) })
    }

    fn adopt_config(&self, theirs: &[u8]) -> Result<(), String> {
        let (ours, up) =
            (self.config(), theirs.get(6).is_some_and(|status| u16::from(*status) & LINK_UP != 0));
        let fixed = [(0..6, "the card's address"), (8..10, "--num-queue-pairs"), (10..12, "the MTU")];
        if let Some((_, what)) =
            fixed.into_iter().find(|(at, _)| theirs.get(at.clone()) != Some(&ours[at.clone()]))
        {
            return Err(format!("{what} differs"));
        }
        self.set_link(up).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn save_state(&self) -> Option<Vec<u8>> {
        self.controlled.as_ref().map(|controlled| controlled.save())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), StateRefused> {
        let none = || StateRefused("what it is joined to has no control queue".into());
        self.controlled.as_ref().ok_or_else(none)?.load(state)
    }

    fn keep(&self, memento: Option<Memento>) {
        self.controlled.iter().for_each(|controlled| controlled.keep(memento.clone()));
    }

    fn start_queue(&self, index: u16, features: u64, size: u16) -> io::Result<Box<dyn QueueHandler>> {
        self.started.store(features, Ordering::Relaxed);
        if let Some(controlled) = &self.controlled
            && control::queue_index(features, self.card.pairs) == Some(index)
        {
            controlled.begin(features, self.card.mac);
            return Ok(Box::new(ControlQueue::new(Arc::clone(controlled))));
        }
        if index >= 2 * self.card.pairs {
            return Err(io::Error::other(format!(
                "queue {index} is the control queue, which was not negotiated"
            )));
        }
        match &self.joined {
            Joined::Hub(hub, port) => {
                let (hub, own) = (Arc::clone(hub), hub.port(*port));
                Ok(Box::new(Member { hub, port: *port, own, index, features }))
            }
            Joined::Tap(card) => card.start_queue(index, features, size),
        }
    }

    /// A pair stays together.
    fn place(&self, index: u16) -> Option<usize> {
        Some(usize::from(index / 2))
    }

    fn reactor(&self, index: u16) -> Option<usize> {
        self.wanted_on.of(index)
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }

    fn reset(&self) {
        self.started.store(0, Ordering::Relaxed);
        self.controlled.iter().for_each(|controlled| controlled.reset());
    }
}

impl Network for NetDevice {
    fn announce(&self, mac: [u8; 6]) {
        // A guest that can do so does it itself (5.1.6.5.4), asked by whoever has its control queue.
        if self.started.load(Ordering::Relaxed) & GUEST_ANNOUNCE != 0 {
            if self.controlled.as_ref().is_some_and(|controlled| controlled.ask_to_announce())
                && let Some(tell) = self.on_change.get()
            {
                tell();
            }
            return;
        }
        match &self.joined {
            Joined::Hub(hub, port) => hub.announce(*port, MacAddr(mac)),
            Joined::Tap(card) => card.announce(MacAddr(mac)),
        }
    }

    fn set_mtu(&self, mtu: u64) -> Result<(), String> {
        let most = self.card.mtu.unwrap_or(*MTU_RANGE.end());
        let within = u16::try_from(mtu).ok().filter(|mtu| (*MTU_RANGE.start()..=most).contains(mtu));
        let mtu = within.ok_or(format!("an MTU of {mtu} is none from {} to {most}", MTU_RANGE.start()))?;
        if let Joined::Hub(hub, port) = &self.joined {
            hub.set_mtu(*port, mtu.into());
        }
        Ok(())
    }
}
