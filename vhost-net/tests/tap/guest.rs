//! The guest's side: the driver of a pair of queues, with buffers of a size of the test's choice.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::{EfdFlags, EventFd};
use poll_engine::device::{QueueHandler, features};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::{Engine, EngineConfig, RunningQueue};
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::stats::QueueStats;
use vhost_net::header::HEADER;
use vhost_net::pcap::Capture;
use vhost_net::port::tap::Tap;

use super::host::until;

pub const RING: u64 = features::VERSION_1 | features::INDIRECT_DESC | features::EVENT_IDX;

pub fn engine(pacing: Pacing) -> Engine {
    Engine::start(&EngineConfig { pacing, ..EngineConfig::default() }).unwrap()
}

/// One queue, from the driver's side.
pub struct Side {
    pub ring: DriverRing,
    config: RingConfig,
    kick: EventFd,
    running: Option<RunningQueue>,
    pub stats: Arc<QueueStats>,
}

impl Side {
    fn new(ram: &mut Ram, size: u16, features: u64) -> Side {
        let config = DriverRing::lay_out(ram, size, features).unwrap();
        let ring = DriverRing::new(&config, ram.map()).unwrap();
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        Side { ring, config, kick, running: None, stats: Arc::default() }
    }

    fn start(&mut self, engine: &Engine, ram: &Ram, handler: Box<dyn QueueHandler>) {
        let hold = MapHold::new(Arc::clone(ram.map()), WaitGroup::new());
        let kick: OwnedFd = std::os::fd::AsFd::as_fd(&self.kick).try_clone_to_owned().unwrap();
        let notifier = Notifier { kick: Some(kick), ..Notifier::default() };
        let queue = Queue::new("q".into(), &self.config, hold, notifier, Arc::clone(&self.stats)).unwrap();
        self.running = Some(engine.run_queue(queue, handler, None).unwrap());
    }

    /// Stops the queue; its base.
    pub fn stop(&mut self) -> u32 {
        let base = self.running.take().unwrap().stop().unwrap();
        self.config.base = base;
        base
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            self.kick.write(1).unwrap();
        }
    }
}

/// A guest with one pair of queues.
pub struct Guest {
    pub ram: Ram,
    pub rx: Side,
    pub tx: Side,
    features: u64,
    ring_size: u16,
    pair: u16,
    /// Where the receive buffers are, by the names of their chains.
    posted: HashMap<u16, u64>,
    buffers: Vec<u64>,
    buffer_len: u32,
    out: u64,
}

impl Guest {
    /// On pair 0 of `tap`, with receive buffers of `buffer_len` bytes, none of which has been posted.
    pub fn on(tap: &Arc<Tap>, engine: &Engine, features: u64, ring_size: u16, buffer_len: u32) -> Guest {
        Guest::on_pair(0, tap, engine, features, ring_size, buffer_len)
    }

    /// As [`on`](Self::on), noted in a capture.
    pub fn captured(
        tap: &Arc<Tap>,
        engine: &Engine,
        features: u64,
        ring_size: u16,
        buffer_len: u32,
        capture: &Capture,
    ) -> Guest {
        let mut guest = Guest::lay_out(0, features, ring_size, buffer_len);
        guest.run(tap, engine, Some(capture));
        guest
    }

    pub fn on_pair(
        pair: u16,
        tap: &Arc<Tap>,
        engine: &Engine,
        features: u64,
        ring_size: u16,
        buffer_len: u32,
    ) -> Guest {
        let mut guest = Guest::lay_out(pair, features, ring_size, buffer_len);
        guest.start(tap, engine);
        guest
    }

    fn lay_out(pair: u16, features: u64, ring_size: u16, buffer_len: u32) -> Guest {
        let features = features | RING;
        let mut ram = Ram::new(0x10_0000, 64 << 20, false).unwrap();
        let rx = Side::new(&mut ram, ring_size, features);
        let tx = Side::new(&mut ram, ring_size, features);
        let buffers = (0..ring_size).map(|_| ram.alloc(buffer_len.into(), 64).unwrap()).collect();
        let out = ram.alloc(128 << 10, 4096).unwrap();
        let posted = HashMap::new();
        Guest { ram, rx, tx, features, ring_size, pair, posted, buffers, buffer_len, out }
    }

    /// Starts both queues (again).
    pub fn start(&mut self, tap: &Arc<Tap>, engine: &Engine) {
        self.run(tap, engine, None);
    }

    fn run(&mut self, tap: &Arc<Tap>, engine: &Engine, capture: Option<&Capture>) {
        let probe = || capture.map(|capture| capture.probe(0));
        tap.negotiated(self.features).unwrap();
        let receive = tap.receive(self.pair, self.features, self.ring_size).unwrap();
        let transmit = tap.transmit(self.pair, self.features, self.ring_size).unwrap();
        self.rx.start(engine, &self.ram, Box::new(receive.captured(probe())));
        self.tx.start(engine, &self.ram, Box::new(transmit.captured(probe())));
    }

    pub fn stop(&mut self) {
        self.rx.stop();
        self.tx.stop();
    }

    /// Posts up to `count` receive buffers.
    pub fn post(&mut self, count: usize) {
        for _ in 0..count {
            let Some(addr) = self.buffers.pop() else { break };
            let id = self.rx.ring.add(&[Buffer { addr, len: self.buffer_len, writable: true }]).unwrap();
            self.posted.insert(id, addr);
        }
        self.rx.publish();
    }

    /// Sends a frame in two pieces, the first of them the header if `cut` is 0; returns when it is over.
    pub fn send(&mut self, header: [u8; HEADER], frame: &[u8], cut: usize) {
        let bytes = [&header, frame].concat();
        let cut = HEADER + cut.min(frame.len());
        self.send_raw(&bytes, &[cut, bytes.len() - cut]);
    }

    /// Sends these bytes as a chain of pieces of these lengths; returns when it is over.
    pub fn send_raw(&mut self, bytes: &[u8], lens: &[usize]) {
        self.begin(bytes, lens);
        until("frame to be sent", || self.tx.ring.finished() > 0);
        assert_eq!(self.tx.ring.collect().map(|(_, written)| written), Some(0));
    }

    fn begin(&mut self, bytes: &[u8], lens: &[usize]) {
        let out = self.ram.map().slice(self.out, bytes.len() as u32).unwrap();
        assert_eq!(out.write(bytes), bytes.len());
        let mut at = self.out;
        let mut pieces = Vec::new();
        for &len in lens.iter().filter(|&&len| len > 0) {
            pieces.push(Buffer { addr: at, len: len as u32, writable: false });
            at += len as u64;
        }
        if pieces.len() < 8 {
            self.tx.ring.add(&pieces).unwrap();
        } else {
            let table = self.ram.alloc(16 * pieces.len() as u64, 16).unwrap();
            self.tx.ring.add_indirect(self.ram.map(), table, &pieces).unwrap();
        }
        self.tx.publish();
    }

    /// The next frame, if there is one, with its header; its buffers are free to be posted again.
    pub fn receive(&mut self) -> Option<([u8; HEADER], Vec<u8>)> {
        if self.rx.ring.finished() == 0 {
            return None;
        }
        let mut bytes = self.collect();
        assert!(bytes.len() > HEADER, "a buffer of {} bytes", bytes.len());
        let header: [u8; HEADER] = bytes[..HEADER].try_into().unwrap();
        let count = u16::from_le_bytes([header[10], header[11]]);
        assert!(count > 0);
        for nth in 1..count {
            until("further buffer", || self.rx.ring.finished() > 0);
            let more = self.collect();
            assert!(more.len() == self.buffer_len as usize || nth == count - 1, "a gap");
            bytes.extend(more);
        }
        Some((header, bytes.split_off(HEADER)))
    }

    fn collect(&mut self) -> Vec<u8> {
        let (id, written) = self.rx.ring.collect().unwrap();
        let addr = self.posted.remove(&id).unwrap();
        self.buffers.push(addr);
        let mut bytes = vec![0; written as usize];
        if written > 0 {
            self.ram.map().slice(addr, written).unwrap().read(&mut bytes);
        }
        bytes
    }

    /// A buffer that came back with nothing in it.
    pub fn returned(&mut self) -> bool {
        self.rx.ring.finished() > 0 && self.collect().is_empty()
    }

    pub fn wait(&mut self) -> ([u8; HEADER], Vec<u8>) {
        let mut got = None;
        until("a frame at the guest", || {
            got = self.receive();
            got.is_some()
        });
        got.unwrap()
    }
}
