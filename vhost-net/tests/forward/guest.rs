//! A switch with sockets, and guests behind them: each with memory of its own, filled with a secret of its own.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use poll_engine::device::Device;
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::{CpuList, usable_cpus};
use poll_engine::engine::{Engine, EngineConfig, RunningStation};
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::session::wire::protocol;
use poll_engine::stats::QueueStats;
use vhost_net::control::queue_index;
use vhost_net::device::{Card, Joined, NetDevice};
use vhost_net::features::MRG_RXBUF;
use vhost_net::header::{HEADER, VnetHdr, header_len};
use vhost_net::hub::{Hub, Plan, Port};
use vhost_net::outside::Outside;
use vhost_net::pcap::Capture;
use vhost_net::port::Uplink;
use vhost_net::shard::Shard;
use vhost_net::spec::PortSpec;
use vhost_net::switch::fdb::FdbConfig;
use vhost_net::switch::{PortConfig, PortId, Switch};
use vhost_net::witness::Witness;

use crate::peer::{FEATURES, Peer, eventfd, longs, until, words};

const RING: u16 = 64;
/// Bytes of a buffer.
const BUFFER: u32 = 2048;
const MEMORY: u64 = 1 << 19;

/// A switch that serves.
pub struct Back {
    pub hub: Arc<Hub>,
    pub switch: Arc<Switch>,
    servers: Vec<Option<Server>>,
    devices: Vec<Arc<NetDevice>>,
    stats: Vec<Vec<Arc<QueueStats>>>,
    pairs: u16,
    stations: Mutex<HashMap<usize, RunningStation>>,
    engine: Arc<Engine>,
    dir: tempfile::TempDir,
}

impl Back {
    /// With a port for each text, which says what it is.
    pub fn start(ports: &[&str], pairs: u16, reactors: usize) -> Back {
        Back::start_with(ports, pairs, reactors, None)
    }

    /// With an uplink as well, whose port is the last one.
    pub fn start_with(ports: &[&str], pairs: u16, reactors: usize, uplink: Option<Box<dyn Uplink>>) -> Back {
        Back::start_captured(ports, pairs, reactors, uplink, None)
    }

    /// With a capture as well, which has the ports as its first interfaces.
    pub fn start_captured(
        ports: &[&str],
        pairs: u16,
        reactors: usize,
        uplink: Option<Box<dyn Uplink>>,
        capture: Option<&Capture>,
    ) -> Back {
        Back::start_as(Plan::Switch, ports, pairs, reactors, uplink, capture)
    }

    /// With ports that are joined in another way.
    pub fn start_as(
        plan: Plan,
        ports: &[&str],
        pairs: u16,
        reactors: usize,
        uplink: Option<Box<dyn Uplink>>,
        capture: Option<&Capture>,
    ) -> Back {
        // Longer than any test.
        Back::start_patient(plan, ports, pairs, reactors, uplink, capture, Duration::from_secs(60))
    }

    /// The same, waiting for guests for so long.
    pub fn start_patient(
        plan: Plan,
        ports: &[&str],
        pairs: u16,
        reactors: usize,
        mut uplink: Option<Box<dyn Uplink>>,
        capture: Option<&Capture>,
        patience: Duration,
    ) -> Back {
        // More reactors than CPUs are slow, but right.
        let cpus = usable_cpus().unwrap();
        let cpus = CpuList((0..reactors).map(|i| cpus[i % cpus.len()]).collect());
        let config = EngineConfig { cpus, pacing: Pacing::Event, ..EngineConfig::default() };
        let engine = Arc::new(Engine::start(&config).unwrap());
        let mut configs: Vec<_> = (0..).zip(ports).map(|(at, text)| port_config(at, text)).collect();
        configs.extend(uplink.iter().map(|_| PortConfig::new("uplink")));
        let switch = Arc::new(Switch::new(FdbConfig::default(), &configs, reactors));
        let made = ports.iter().zip(&configs);
        let made = made.map(|(text, c)| Arc::new(Port::new(c.name.clone(), pairs, text.contains("wait"))));
        let mut made: Vec<_> = made.collect();
        made.extend(uplink.iter().map(|_| Arc::new(Port::uplink("uplink".into(), 0))));
        let mut hub = match plan {
            Plan::Switch => Hub::switched(Arc::clone(&switch), made, reactors),
            plan => Hub::new(plan, made, reactors),
        };
        hub.uplink = uplink.as_ref().map(|_| ports.len() as u16);
        let hub = Arc::new(hub.patient(patience));
        hub.connect(&engine);
        let stations = (0..reactors).map(|at| {
            let mut shard = Shard::new(Arc::clone(&hub), at);
            if let Some(uplink) = uplink.take_if(|_| at == 0) {
                shard = shard.with_outside(Outside::new(ports.len(), uplink));
            }
            if let Some(capture) = capture {
                let interfaces = (0..hub.ports().len() as u32).collect();
                shard = shard.with_witness(Witness::new(capture.probe(0), interfaces));
            }
            engine.add_station(at, Box::new(shard)).unwrap()
        });
        let stations = Mutex::new(stations.enumerate().collect());
        let dir = tempfile::tempdir().unwrap();
        let (servers, devices, stats) = (vec![], vec![], vec![]);
        let mut back = Back { hub, switch, servers, devices, stats, pairs, stations, engine, dir };
        (0..ports.len()).for_each(|at| back.serve(at));
        back
    }

    fn serve(&mut self, at: usize) {
        let card = Card { mac: Some(mac(at).0), mtu: None, pairs: self.pairs, ring_size: 256 };
        let device = Arc::new(NetDevice::new(card, Joined::Hub(Arc::clone(&self.hub), at), 0));
        let stats: Vec<Arc<QueueStats>> =
            std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
        let export = Export {
            name: format!("port{at}"),
            device: Arc::clone(&device) as _,
            stats: stats.clone(),
            engine: Arc::clone(&self.engine),
        };
        let server = Server::start(export, Listener::bind(&self.socket(at)).unwrap(), || {}).unwrap();
        device.on_change(server.config_notifier());
        if at == self.servers.len() {
            self.servers.push(Some(server));
            self.devices.push(device);
            self.stats.push(stats);
        } else {
            (self.servers[at], self.devices[at], self.stats[at]) = (Some(server), device, stats);
        }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// One more port: its number.
    pub fn add(&mut self, text: &str) -> usize {
        let at = self.servers.iter().position(Option::is_none).unwrap_or(self.servers.len());
        let config = port_config(at, text);
        let port = Port::new(config.name.clone(), self.pairs, text.contains("wait"));
        assert_eq!(self.hub.add_port(port, config, &self.engine), Ok(at));
        self.serve(at);
        at
    }

    /// One port less.
    pub fn remove(&mut self, at: usize) {
        drop(self.servers[at].take());
        self.hub.remove_port(at, &self.engine).unwrap();
    }

    /// The guest at a port, with all its buffers made available.
    pub fn guest(&self, at: usize, pairs: u16) -> Guest {
        self.guest_with(at, pairs, MRG_RXBUF)
    }

    /// The same, with features of network cards.
    pub fn guest_with(&self, at: usize, pairs: u16, features: u64) -> Guest {
        self.connect(at, pairs, features, RING)
    }

    /// The guest at a port, which receives nothing yet.
    pub fn idle_guest(&self, at: usize, pairs: u16) -> Guest {
        self.connect(at, pairs, MRG_RXBUF, 0)
    }

    fn connect(&self, at: usize, pairs: u16, features: u64, buffers: u16) -> Guest {
        let control = queue_index(features, self.pairs);
        let guest = Guest::connect(&socket(self.dir.path(), at), at, pairs, (features, control), buffers);
        until("the link", || self.hub.switch.is_none() || self.switch.is_up(PortId(at as u16)));
        guest
    }

    /// What serves a port.
    pub fn server(&self, at: usize) -> &Server {
        self.servers[at].as_ref().unwrap()
    }

    /// Moves queues of a port to a reactor.
    pub fn move_queues(&self, at: usize, queues: Range<u16>, reactor: usize) {
        self.devices[at].want_on(queues.clone(), reactor);
        self.hub.while_restarting(at, || self.server(at).restart_queues()).unwrap();
        for queue in queues {
            assert_eq!(self.stats[at][usize::from(queue)].reactor(), Some(reactor));
        }
    }

    /// Whether a port's queue does.
    pub fn runs(&self, at: usize, queue: usize) -> bool {
        self.stats[at][queue].reactor().is_some()
    }

    /// One reactor more: its number.
    pub fn add_reactor(&self) -> usize {
        let seat = self.hub.reserve(&self.engine).unwrap();
        let shard = |number, waker| vec![Box::new(seat.shard(number, waker, Witness::default())) as _];
        let (number, stations) = self.engine.add_reactor_with(None, shard).unwrap();
        self.stations.lock().unwrap().extend(stations.into_iter().map(|station| (number, station)));
        number
    }

    /// One less.
    pub fn retire(&self, number: usize) {
        let retiring = self.engine.retire(number).unwrap();
        for (at, stats) in self.stats.iter().enumerate() {
            if stats.iter().any(|queue| queue.reactor() == Some(number)) {
                self.hub.while_restarting(at, || self.server(at).restart_queues()).unwrap();
            }
        }
        let left = self.hub.leave(&retiring, &self.engine).unwrap();
        drop(self.stations.lock().unwrap().remove(&number));
        left.count(&self.hub);
        retiring.finish();
    }

    /// Where it does.
    pub fn socket(&self, at: usize) -> std::path::PathBuf {
        socket(self.dir.path(), at)
    }

    /// Requests in a port's queue that something was wrong with.
    pub fn errors(&self, port: usize, queue: usize) -> u64 {
        self.stats[port][queue].errors_total()
    }

    /// Frames of a port that were dropped, by any name with this in it.
    pub fn drops(&self, port: usize, name: &str) -> u64 {
        let all = self.switch.counters(PortId(port as u16));
        all.iter().filter(|(n, _)| n.contains(name)).map(|(_, n)| n).sum()
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        self.servers.clear();
        self.stations.lock().unwrap().clear();
        let _ = &self.engine;
    }
}

fn socket(dir: &Path, at: usize) -> std::path::PathBuf {
    dir.join(format!("port{at}"))
}

pub fn mac(at: usize) -> vhost_net::mac::MacAddr {
    vhost_net::mac::MacAddr([0x52, 0x54, 0, 0, 0, at as u8 + 1])
}

fn port_config(at: usize, text: &str) -> PortConfig {
    let given = if text.is_empty() { String::new() } else { format!(",{text}") };
    format!("name=port{at},mac={}{given}", mac(at)).parse::<PortSpec>().unwrap().rules()
}

/// A receive or a transmit queue.
pub struct Ring {
    config: RingConfig,
    driver: DriverRing,
    kick: EventFd,
    call: EventFd,
    /// Buffers, by the descriptor that they have.
    buffers: Vec<u64>,
    free: Vec<u64>,
    heads: Vec<Vec<u64>>,
}

impl Ring {
    fn new(ram: &mut Ram, features: u64) -> Ring {
        let begin = ram.alloc(0, 4096).unwrap();
        let config = DriverRing::lay_out(ram, RING, features).unwrap();
        let end = ram.alloc(0, 1).unwrap();
        // A ring begins as zeros.
        fill(ram.map(), begin, (end - begin) as usize, [0; 8]);
        let buffers: Vec<u64> = (0..RING).map(|_| ram.alloc(u64::from(BUFFER), 64).unwrap()).collect();
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        let heads = vec![vec![]; usize::from(RING)];
        Ring { config, driver, kick: eventfd(), call: eventfd(), free: buffers.clone(), buffers, heads }
    }

    fn set_up(&self, peer: &mut Peer, index: u32) {
        peer.set_ring(index, &self.config, 0);
        assert!(peer.ack(13, &longs(&[index.into()]), &[self.call.as_raw_fd()]));
        assert!(peer.ack(12, &longs(&[index.into()]), &[self.kick.as_raw_fd()]));
        assert!(peer.ack(18, &words(&[index, 1]), &[]));
    }

    fn publish(&mut self) {
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    /// Makes a receive buffer available.
    pub fn offer(&mut self, _: &MemoryMap) {
        let addr = self.free.pop().unwrap();
        let head = self.driver.add(&[Buffer { addr, len: BUFFER, writable: true }]).unwrap();
        self.heads[usize::from(head)] = vec![addr];
        self.publish();
    }

    /// The next finished chain's buffers, and how much was written to it.
    fn collect(&mut self) -> Option<(Vec<u64>, u32)> {
        if self.driver.finished() == 0 {
            return None;
        }
        let (head, len) = self.driver.collect()?;
        let buffers = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(!buffers.is_empty(), "a chain that was offered");
        Some((buffers, len))
    }

    /// Takes back what was sent.
    fn reclaim(&mut self) {
        while let Some((buffers, _)) = self.collect() {
            self.free.extend(buffers);
        }
    }
}

/// What describes a record to the back end, and its file.
type Record = (Vec<u8>, OwnedFd);

/// A guest with one network card.
pub struct Guest {
    pub at: usize,
    /// The session goes on for as long as it is kept.
    pub peer: Peer,
    pub map: Arc<MemoryMap>,
    pub rx: Vec<Ring>,
    pub tx: Vec<Ring>,
    control: Option<Ring>,
    ram: Ram,
    /// Bytes of a header.
    header: usize,
    /// What it has received, the headers before it, and in which queues it came.
    pub got: Vec<Vec<u8>>,
    pub headers: Vec<Vec<u8>>,
    pub queues: Vec<usize>,
    /// Buffers of the last frame that are still to come.
    missing: usize,
    /// What was agreed on, the number of the control queue, and the record of what is in flight.
    session: (u64, Option<u16>, Option<Record>),
}

impl Guest {
    /// With so many buffers to receive into from the beginning.
    pub fn connect(
        path: &Path,
        at: usize,
        pairs: u16,
        (features, control): (u64, Option<u16>),
        buffers: u16,
    ) -> Guest {
        Guest::connect_keeping(path, at, pairs, (features, control), buffers, None)
    }

    /// The same, keeping a record of what is in flight if it is told of how many queues.
    pub fn connect_keeping(
        path: &Path,
        at: usize,
        pairs: u16,
        (features, control): (u64, Option<u16>),
        buffers: u16,
        recorded: Option<u16>,
    ) -> Guest {
        let features = FEATURES | features;
        let mut ram = Ram::new((at as u64 + 1) << 32, MEMORY * (u64::from(pairs) + 1), false).unwrap();
        let all = ram.spec();
        fill(ram.map(), all.guest_addr, all.size as usize, secret(at));
        let mut peer = Guest::greet(path, features);
        let record = recorded.map(|queues| {
            let asked = [&longs(&[0, 0])[..], &queues.to_ne_bytes(), &RING.to_ne_bytes()].concat();
            let (spec, fd) = peer.ask_fd(31, &asked);
            (spec, fd.unwrap())
        });
        if let Some((spec, fd)) = &record {
            assert!(peer.ack(32, spec, &[fd.as_raw_fd()]));
        }
        let mut rings: Vec<Ring> = (0..2 * pairs).map(|_| Ring::new(&mut ram, features)).collect();
        assert!(peer.mem_table(&[(ram.spec(), ram.fd().as_fd().as_raw_fd())]));
        for rx in rings.iter_mut().step_by(2) {
            (0..buffers).for_each(|_| rx.offer(ram.map()));
        }
        (0..).zip(&rings).for_each(|(index, ring)| ring.set_up(&mut peer, index));
        let header = header_len(features);
        let control_index = control;
        let control = control.map(|index| {
            let ring = Ring::new(&mut ram, features);
            ring.set_up(&mut peer, index.into());
            ring
        });
        let (mut rx, mut tx) = (vec![], vec![]);
        while !rings.is_empty() {
            rx.push(rings.remove(0));
            tx.push(rings.remove(0));
        }
        let map = Arc::clone(ram.map());
        let (got, headers, queues) = Default::default();
        let session = (features, control_index, record);
        Guest { at, peer, map, rx, tx, control, ram, header, got, headers, queues, missing: 0, session }
    }

    fn greet(path: &Path, features: u64) -> Peer {
        let mut peer = Peer::new(UnixStream::connect(path).unwrap());
        peer.send(3, false, &[], &[]);
        peer.send(2, false, &longs(&[features]), &[]);
        let protocol = protocol::MQ
            | protocol::REPLY_ACK
            | protocol::CONFIG
            | protocol::INFLIGHT_SHMFD
            | protocol::RESET_DEVICE;
        assert_eq!(peer.ask_number(15) & protocol, protocol);
        peer.send(16, false, &longs(&[protocol]), &[]);
        peer
    }

    /// Connects again, to a back end that comes after the last one, with the same rings and the record.
    pub fn reconnect(&mut self, path: &Path) {
        let (features, control, record) = &self.session;
        let mut peer = Guest::greet(path, *features);
        if let Some((spec, fd)) = record {
            assert!(peer.ack(32, spec, &[fd.as_raw_fd()]));
        }
        assert!(peer.mem_table(&[(self.ram.spec(), self.ram.fd().as_fd().as_raw_fd())]));
        for (pair, (rx, tx)) in (0..).zip(self.rx.iter().zip(&self.tx)) {
            rx.set_up(&mut peer, 2 * pair);
            tx.set_up(&mut peer, 2 * pair + 1);
        }
        for (ring, index) in self.control.iter().zip(control) {
            ring.set_up(&mut peer, (*index).into());
        }
        self.peer = peer;
    }

    /// Has a command done: class, command, data; the answer.
    pub fn command(&mut self, bytes: &[u8]) -> u8 {
        self.command_in(&[bytes.len()], bytes, 1)
    }

    /// The same, of which each buffer has so many bytes at most, with so many for the answer.
    pub fn command_in(&mut self, parts: &[usize], bytes: &[u8], room: u32) -> u8 {
        let ring = self.control.as_mut().unwrap();
        let mut buffers = vec![];
        let mut rest = bytes;
        for len in parts {
            let (part, behind) = rest.split_at((*len).min(rest.len()));
            rest = behind;
            for piece in part.chunks(BUFFER as usize) {
                let addr = ring.buffers[buffers.len()];
                self.map.slice(addr, BUFFER).unwrap().write(piece);
                buffers.push(Buffer { addr, len: piece.len() as u32, writable: false });
            }
        }
        let answer = *ring.buffers.last().unwrap();
        self.map.slice(answer, BUFFER).unwrap().write(&[0xee; 2]);
        if room > 0 {
            buffers.push(Buffer { addr: answer, len: room, writable: true });
        }
        let head = ring.driver.add(&buffers).unwrap();
        ring.heads[usize::from(head)] = vec![answer];
        ring.publish();
        let mut written = None;
        until("an answer", || {
            written = ring.collect().map(|(_, len)| len);
            written.is_some()
        });
        assert_eq!(written, Some(room.min(1)));
        let mut said = [0; 2];
        self.map.slice(answer, BUFFER).unwrap().read(&mut said);
        assert_eq!(said[1], 0xee);
        said[0]
    }

    /// Sends a frame behind a header without anything.
    pub fn send(&mut self, pair: usize, frame: &[u8]) {
        let bytes = [&vec![0; self.header][..], frame].concat();
        self.send_raw(pair, &bytes);
    }

    /// Sends any bytes, in as many buffers as they need.
    pub fn send_raw(&mut self, pair: usize, bytes: &[u8]) {
        self.queue_raw(pair, bytes);
        self.tx[pair].publish();
    }

    /// Sends frames, all of which come to be seen at once, behind headers without anything.
    pub fn send_burst<'a>(&mut self, pair: usize, frames: impl IntoIterator<Item = &'a Vec<u8>>) {
        for frame in frames {
            self.queue_raw(pair, &[&vec![0; self.header][..], frame].concat());
        }
        self.tx[pair].publish();
    }

    /// Has any bytes ready to be sent.
    fn queue_raw(&mut self, pair: usize, bytes: &[u8]) {
        let tx = &mut self.tx[pair];
        let parts = bytes.chunks(BUFFER as usize);
        until("transmit buffers", || {
            tx.reclaim();
            tx.free.len() >= parts.len()
        });
        let addrs = tx.free.split_off(tx.free.len() - parts.len());
        let buffers: Vec<_> = addrs
            .iter()
            .zip(parts)
            .map(|(&addr, part)| {
                self.map.slice(addr, BUFFER).unwrap().write(part);
                Buffer { addr, len: part.len() as u32, writable: false }
            })
            .collect();
        let head = tx.driver.add(&buffers).unwrap();
        tx.heads[usize::from(head)] = addrs;
    }

    /// Whether all that was sent has been taken.
    pub fn all_sent(&mut self) -> bool {
        self.tx.iter_mut().all(|tx| {
            tx.reclaim();
            tx.free.len() == tx.buffers.len()
        })
    }

    /// Takes what has come, and gives the buffers back.
    pub fn receive(&mut self) {
        self.receive_some(usize::MAX);
    }

    /// The same, of at most so many buffers of each queue, where there is no end to it.
    pub fn receive_some(&mut self, most: usize) {
        for at in 0..self.rx.len() {
            let mut left = most;
            while left > 0 || self.missing > 0 {
                let Some((buffers, len)) = self.rx[at].collect() else { break };
                left = left.saturating_sub(1);
                let bytes = self.take_buffer(at, buffers[0], len);
                if self.missing == 0 {
                    self.missing = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
                    self.headers.push(bytes[..self.header].to_vec());
                    self.got.push(bytes[self.header..].to_vec());
                    self.queues.push(at);
                } else if let Some(frame) = self.got.last_mut() {
                    frame.extend(bytes);
                }
                self.missing -= 1;
            }
            assert_eq!(self.missing, 0, "all buffers of a frame come at once");
        }
    }

    fn take_buffer(&mut self, at: usize, addr: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.map.slice(addr, len).unwrap().read(&mut bytes);
        // What is behind the frame is as it was.
        if len < BUFFER {
            let mut behind = vec![0; (BUFFER - len) as usize];
            self.map.slice(addr + u64::from(len), BUFFER - len).unwrap().read(&mut behind);
            self.check_secret(addr + u64::from(len), &behind);
        }
        fill(&self.map, addr, BUFFER as usize, secret(self.at));
        self.rx[at].free.push(addr);
        let map = Arc::clone(&self.map);
        self.rx[at].offer(&map);
        bytes
    }

    fn check_secret(&self, addr: u64, bytes: &[u8]) {
        let own = secret(self.at);
        let first = (addr - self.ram.spec().guest_addr) as usize;
        let changed = (first..).zip(bytes).position(|(i, b)| *b != own[i % 8]);
        assert_eq!(changed, None, "memory of guest {} at {addr:#x}", self.at);
    }

    /// Waits until so many frames have come, and a little longer for more; all of them.
    pub fn await_frames(&mut self, count: usize) -> Vec<Vec<u8>> {
        let what = format!("{count} frames for guest {}", self.at);
        until(&what, || {
            self.receive();
            self.got.len() >= count
        });
        let plain = |header: &Vec<u8>| header[..10] == [0; 10];
        assert!(std::mem::take(&mut self.headers).iter().all(plain), "headers that ask for something");
        std::mem::take(&mut self.got)
    }

    /// Waits until so many frames have come whose headers are looked at by whoever asks; all of them.
    pub fn await_frames_and_headers(&mut self, count: usize) -> Vec<Vec<u8>> {
        until("frames", || {
            self.receive();
            self.got.len() >= count
        });
        std::mem::take(&mut self.got)
    }

    /// The next frame with its header.
    pub fn await_offload(&mut self) -> (VnetHdr, Vec<u8>) {
        until("a frame", || {
            self.receive();
            !self.got.is_empty()
        });
        let header = self.headers.remove(0);
        (VnetHdr::from_bytes(header[..HEADER].try_into().unwrap()), self.got.remove(0))
    }

    /// Everything in its memory that is neither ring nor buffer is as it was, and nothing anywhere is of another guest's.
    pub fn check_memory(&self, guests: usize) {
        let spec = self.ram.spec();
        let mut all = vec![0; spec.size as usize];
        self.map.slice(spec.guest_addr, spec.size as u32).unwrap().read(&mut all);
        for other in (0..guests).filter(|&other| other != self.at) {
            let theirs = secret(other);
            let mut places = (0..all.len()).filter(|&i| all[i] == theirs[0]);
            let found = places.find(|&i| all[i..].starts_with(&theirs));
            assert_eq!(found, None, "guest {} has what is guest {other}'s", self.at);
        }
        let rings = self.rx.iter().chain(&self.tx).chain(&self.control);
        let buffers = rings.flat_map(|r| r.buffers.iter());
        let end = buffers.max().unwrap() + u64::from(BUFFER);
        self.check_secret(end, &all[(end - spec.guest_addr) as usize..]);
    }
}

/// Eight bytes that nobody else has; as they repeat, none of them is at the beginning of another's.
fn secret(at: usize) -> [u8; 8] {
    std::array::from_fn(|i| 0x80 | (at as u8) << 3 | i as u8)
}

/// Fills memory with a pattern that goes on from the beginning of the memory.
fn fill(map: &MemoryMap, addr: u64, len: usize, pattern: [u8; 8]) {
    let bytes: Vec<u8> = (0..len).map(|i| pattern[(addr as usize + i) % 8]).collect();
    map.slice(addr, len as u32).unwrap().write(&bytes);
}
