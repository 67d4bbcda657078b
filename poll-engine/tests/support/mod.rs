//! A device that echoes, a front end that can say anything, and a guest behind it.
#![allow(dead_code)] // each test program uses its part

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use poll_engine::device::{ConfigRefused, Device, QueueHandler, StateRefused};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Dormancy, Engine, EngineConfig};
use poll_engine::memory::{Ram, RegionSpec};
use poll_engine::ring::RingConfig;
use poll_engine::ring::chain::HeldChain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::handover::Snapshot;
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;

pub mod peer;

pub use peer::*;

pub const QUEUES: u16 = 2;
pub const MAX_RING: u16 = 256;

/// Copies what a request brings to where it wants an answer: at once, or, while told to hold, when the gate is opened.
pub struct Echo {
    pub config: Mutex<[u8; 64]>,
    pub resets: AtomicUsize,
    pub hold: AtomicBool,
    pub held: Arc<AtomicUsize>,
    /// It has nothing to do with requests.
    pub idle: AtomicBool,
    /// What it takes along, if it offers that.
    pub state: Mutex<Option<Vec<u8>>>,
    /// On which reactor its queues are wanted.
    pub wanted_on: Mutex<Option<usize>>,
    gate: EventFd,
}

impl Echo {
    /// Lets held requests go.
    pub fn pulse(&self) {
        self.gate.write(1).unwrap();
    }

    /// Lets held requests go, and new ones pass.
    pub fn open_gate(&self) {
        self.hold.store(false, Ordering::Release);
        self.gate.write(1).unwrap();
    }
}

pub struct Shared(pub Arc<Echo>);

impl Device for Shared {
    fn features(&self) -> u64 {
        1
    }
    fn num_queues(&self) -> u16 {
        QUEUES
    }
    fn max_ring_size(&self) -> u16 {
        MAX_RING
    }
    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let config = self.0.config.lock().unwrap();
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        let mut config = self.0.config.lock().unwrap();
        // The second half is writable.
        let room = config.get_mut(start..end).filter(|_| start >= 32);
        room.map(|to| to.copy_from_slice(bytes)).ok_or(ConfigRefused { offset, end: end as u32 })
    }
    fn save_state(&self) -> Option<Vec<u8>> {
        self.0.state.lock().unwrap().clone()
    }
    fn load_state(&self, state: &[u8]) -> Result<(), StateRefused> {
        if !state.starts_with(b"echo") {
            return Err(StateRefused("no echo".into()));
        }
        *self.0.state.lock().unwrap() = Some(state.to_vec());
        Ok(())
    }
    fn start_queue(&self, _: u16, _: u64, _: u16) -> std::io::Result<Box<dyn QueueHandler>> {
        let gate = self.0.gate.as_fd().try_clone_to_owned()?;
        Ok(Box::new(Handler { echo: Arc::clone(&self.0), gate, held: Vec::new() }))
    }
    fn reactor(&self, _: u16) -> Option<usize> {
        *self.0.wanted_on.lock().unwrap()
    }
    fn reset(&self) {
        self.0.resets.fetch_add(1, Ordering::AcqRel);
    }
}

struct Handler {
    echo: Arc<Echo>,
    gate: OwnedFd,
    held: Vec<(Request, HeldChain)>,
}

fn echo(chain: &poll_engine::ring::chain::ChainView<'_>) -> u32 {
    let mut bytes = vec![0; chain.readable_len() as usize];
    chain.readable(0, u32::MAX).read(&mut bytes);
    chain.writable(0, u32::MAX).write(&bytes) as u32
}

impl QueueHandler for Handler {
    fn attach(&mut self, io: &mut Io<'_>) {
        let label = io.label(0);
        io.uring().watch(self.gate.as_fd(), label);
    }
    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        if !self.wants_chains() {
            return 0;
        }
        let ready = queue.ready();
        for _ in 0..ready {
            let Some(request) = queue.take() else { break };
            if self.echo.hold.load(Ordering::Acquire) {
                let mut chain = HeldChain::default();
                queue.hold_chain(&mut chain);
                self.held.push((request, chain));
                self.echo.held.fetch_add(1, Ordering::AcqRel);
            } else {
                let written = echo(&queue.chain());
                queue.complete(request, written);
            }
        }
        ready.into()
    }
    fn complete(&mut self, queue: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {
        for (request, chain) in self.held.drain(..) {
            let chain = chain.view().unwrap();
            let written = echo(&chain);
            self.echo.held.fetch_sub(1, Ordering::AcqRel);
            queue.complete_held(request, written, &chain);
        }
    }
    fn wants_chains(&self) -> bool {
        !self.echo.idle.load(Ordering::Acquire)
    }
    fn detach(&mut self, io: &mut Io<'_>) {
        let (watch, own) = (io.label(0), io.label(1));
        io.uring().unwatch(watch, own);
    }
}

/// The back end.
pub struct Back {
    pub echo: Arc<Echo>,
    pub stats: Vec<Arc<QueueStats>>,
    pub socket: PathBuf,
    pub server: Server,
    pub engine: Arc<Engine>,
    dormancy: Dormancy,
    dir: Arc<tempfile::TempDir>,
}

impl Back {
    pub fn start(pacing: Pacing) -> Back {
        Back::start_with(pacing, Dormancy::default())
    }

    /// That leaves rings to their kicks by this.
    pub fn start_with(pacing: Pacing, dormancy: Dormancy) -> Back {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let listener = Listener::bind(&dir.path().join("s")).unwrap();
        Back::make((pacing, dormancy), dir, |export| Server::start(export, listener, || {}).unwrap())
    }

    fn make(
        (pacing, dormancy): (Pacing, Dormancy),
        dir: Arc<tempfile::TempDir>,
        serve: impl FnOnce(Export) -> Server,
    ) -> Back {
        let socket = dir.path().join("s");
        let mut config = [0; 64];
        (0..).zip(&mut config).for_each(|(i, byte)| *byte = i);
        let echo = Arc::new(Echo {
            config: Mutex::new(config),
            resets: AtomicUsize::new(0),
            hold: AtomicBool::new(false),
            held: Arc::default(),
            idle: AtomicBool::new(false),
            state: Mutex::default(),
            wanted_on: Mutex::default(),
            gate: eventfd(),
        });
        let stats: Vec<Arc<QueueStats>> = (0..QUEUES).map(|_| Arc::default()).collect();
        let engine =
            Arc::new(Engine::start(&EngineConfig { pacing, dormancy, ..EngineConfig::default() }).unwrap());
        let device = Arc::new(Shared(Arc::clone(&echo)));
        let export =
            Export { name: "echo".into(), device, stats: stats.clone(), engine: Arc::clone(&engine) };
        let server = serve(export);
        Back { echo, stats, socket, server, engine, dormancy, dir }
    }

    /// As a live upgrade does: another back end goes on with the session, and this one has left. What goes from the one to
    /// the other goes as it does between processes. How many bytes of a next message were among it.
    pub fn hand_over(self, pacing: Pacing) -> (Back, usize) {
        let freeze = self.server.freeze();
        let until = Instant::now() + LIMIT;
        freeze.wait_parked(until).unwrap();
        freeze.stop();
        let (state, fds) = freeze.snapshot(until).unwrap().into_parts();
        let partial = state.session.as_ref().map_or(0, |session| session.partial.len());
        let said = serde_json::to_vec(&state).unwrap();
        let snapshot = Snapshot::received(serde_json::from_slice(&said).unwrap(), fds);
        let next = Back::make((pacing, self.dormancy), Arc::clone(&self.dir), |export| {
            let prepared = Server::resume(export, snapshot, || {}).unwrap();
            prepared.wait_ready(until).unwrap();
            prepared.go()
        });
        freeze.leave();
        (next, partial)
    }

    pub fn connect(&self) -> Peer {
        Peer::new(UnixStream::connect(&self.socket).unwrap())
    }

    /// Connected and negotiated.
    pub fn front(&self) -> Peer {
        let mut peer = self.connect();
        peer.negotiate();
        peer
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        // A test that fails with a request held must not wait for it.
        self.echo.open_gate();
    }
}

/// A guest with one ring, on queue `index` of a session.
pub struct Guest {
    pub ram: Ram,
    pub config: RingConfig,
    pub driver: DriverRing,
    pub kick: EventFd,
    pub call: EventFd,
    pub index: u32,
    pub data: u64,
    count: u8,
}

impl Guest {
    pub fn new(index: u32) -> Guest {
        Guest::at(index, 0x10_0000 + (u64::from(index) << 32))
    }

    pub fn at(index: u32, guest_addr: u64) -> Guest {
        Guest::lay_out(index, guest_addr, 16)
    }

    /// With a ring of this size.
    pub fn with_ring(index: u32, size: u16) -> Guest {
        Guest::lay_out(index, 0x10_0000 + (u64::from(index) << 32), size)
    }

    fn lay_out(index: u32, guest_addr: u64, size: u16) -> Guest {
        let mut ram = Ram::new(guest_addr, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, size, FEATURES).unwrap();
        let data = ram.alloc(0x1_0000, 4096).unwrap();
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        Guest { ram, config, driver, kick: eventfd(), call: eventfd(), index, data, count: 0 }
    }

    pub fn region(&self) -> (RegionSpec, RawFd) {
        (self.ram.spec(), self.ram.fd().as_raw_fd())
    }

    /// Tells all about the ring but the kick descriptor, and enables nothing.
    pub fn describe(&self, peer: &mut Peer, base: u32) {
        let i = self.index;
        peer.set_ring(i, &self.config, base);
        assert!(peer.ack(13, &longs(&[i.into()]), &[self.call.as_raw_fd()]));
    }

    /// Guest-physical address of the used ring.
    pub fn used(&self) -> u64 {
        let spec = self.ram.spec();
        self.config.used_addr - spec.user_addr + spec.guest_addr
    }

    pub fn set_kick(&self, peer: &mut Peer) {
        assert!(peer.ack(12, &longs(&[self.index.into()]), &[self.kick.as_raw_fd()]));
    }

    pub fn enable(&self, peer: &mut Peer, on: bool) {
        assert!(peer.ack(18, &words(&[self.index, on.into()]), &[]));
    }

    /// Everything, memory included.
    pub fn start(&self, peer: &mut Peer) {
        assert!(peer.mem_table(&[self.region()]));
        self.describe(peer, 0);
        self.set_kick(peer);
        self.enable(peer, true);
    }

    /// Stops the queue; its base.
    pub fn stop(&self, peer: &mut Peer) -> u32 {
        let reply = peer.ask(11, &words(&[self.index, 0]));
        assert_eq!(reply[..4], self.index.to_ne_bytes());
        u32::from_ne_bytes(reply[4..].try_into().unwrap())
    }

    /// Makes a request available, 100 bytes out and as many in, from guest address `at`; kicks when that is wanted.
    pub fn submit_at(&mut self, at: u64, map: &poll_engine::memory::MemoryMap) {
        self.count = self.count.wrapping_add(1);
        if let Some(out) = map.slice(at, 100) {
            out.fill(self.count);
        }
        let buffers = [
            Buffer { addr: at, len: 100, writable: false },
            Buffer { addr: at + 256, len: 100, writable: true },
        ];
        self.driver.add(&buffers).unwrap();
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    pub fn submit(&mut self) {
        let map = Arc::clone(self.ram.map());
        self.submit_at(self.data, &map);
    }

    pub fn wait(&mut self) {
        until("a request", || self.driver.finished() > 0);
        assert_eq!(self.driver.collect().map(|(_, len)| len), Some(100));
    }

    /// One request that must be answered with its own bytes.
    pub fn round_trip(&mut self) {
        self.submit();
        self.wait();
        let mut bytes = [0; 100];
        self.ram.map().slice(self.data + 256, 100).unwrap().read(&mut bytes);
        assert_eq!(bytes, [self.count; 100]);
    }
}
