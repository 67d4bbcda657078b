//! The front ends: connects to one back end or two, or lets them connect, and sets all queue pairs up.

use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use poll_engine::device::features;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Port, Rx, Tx, lay_out};
use super::spec::NetSpec;
use super::worker::{Shared, Worker};
use crate::back_end::{BackEnd, Socket};
use crate::front_end::{Deadline, memory, reach};
use crate::node::{NET, Node, is_node};

/// How long a back end may take to connect to us.
const PATIENCE: Duration = Duration::from_secs(10);

/// Feature bits (virtio 1.3, 5.1.3).
pub mod net_features {
    /// `VIRTIO_NET_F_CSUM`: the back end completes checksums.
    pub const CSUM: u64 = 1;
    /// `VIRTIO_NET_F_GUEST_CSUM`: checksums may be left to the driver.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes packets to be segmented.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_HOST_TSO4`: the back end takes packets to be segmented.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_MQ`.
    pub const MQ: u64 = 1 << 22;
    /// `VIRTIO_NET_F_CTRL_VQ`.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// Of a disk, `VIRTIO_BLK_F_BLK_SIZE`; what was of a network device there has been gone since virtio 1.0.
    pub const BLK_SIZE: u64 = 1 << 6;
}
use net_features::{BLK_SIZE, CSUM, CTRL_VQ, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MQ, MRG_RXBUF};

/// Started sessions: queues run for as long as it is kept.
pub struct Session {
    back_ends: Vec<Box<dyn BackEnd>>,
    /// One for each queue pair, to be taken out and run.
    pub workers: Vec<Worker>,
    /// What was negotiated with each back end.
    pub negotiated: Vec<Negotiated>,
}

/// What was negotiated with one back end.
#[derive(Clone, Copy, Debug)]
pub struct Negotiated {
    /// Feature bits offered.
    pub offered: u64,
    /// Those that are used.
    pub used: u64,
}

impl Session {
    /// Opens all sockets and starts all queues.
    pub fn open(spec: &Arc<NetSpec>) -> Result<Session> {
        let mut listeners = if spec.server { accept(spec)?.into_iter() } else { vec![].into_iter() };
        let mut session = Session { back_ends: Vec::new(), workers: Vec::new(), negotiated: Vec::new() };
        let pairs = usize::from(spec.load.queue_pairs);
        let mut ports: Vec<Vec<Port>> = (0..pairs).map(|_| Vec::new()).collect();
        let calls: Vec<EventFd> =
            (0..pairs).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<std::io::Result<_>>()?;
        for (at, path) in spec.sockets.iter().enumerate() {
            let of_port = if is_node(path) {
                session.port(spec, at, Box::new(Node::open(path, NET)?), &calls)?
            } else {
                let stream = listeners.next().map_or_else(|| reach(path), Ok)?;
                let deadline = Deadline::new(stream.try_clone()?)?;
                // Acknowledged messages tell of a refusal where it happens.
                let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
                let socket = Socket::new(stream, u64::from(spec.load.queue_pairs) * 2, protocol)?;
                let outcome = session.port(spec, at, Box::new(socket), &calls);
                let passed = deadline.passed();
                outcome.map_err(|e| {
                    let late = "does not answer; does it serve another front end?";
                    if passed { anyhow!("{} {late}", path.display()) } else { e }
                })?
            };
            for (pair, port) in ports.iter_mut().zip(of_port) {
                pair.push(port);
            }
        }
        let shared = Arc::new(Shared::new(spec)?);
        for (index, (ports, call)) in ports.into_iter().zip(calls).enumerate() {
            session.workers.push(Worker::new(spec, &shared, index, ports, call));
        }
        Ok(session)
    }

    /// To see when a back end is gone.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        self.back_ends.iter().map(|b| b.fd())
    }

    /// Negotiates with one back end; its queue pairs.
    fn port(
        &mut self,
        spec: &NetSpec,
        at: usize,
        mut back_end: Box<dyn BackEnd>,
        calls: &[EventFd],
    ) -> Result<Vec<Port>> {
        let path = spec.sockets[at].display();
        let pairs = spec.load.queue_pairs;
        let refused = || format!("{path} refused the session");
        let offered = back_end.offered().with_context(refused)?;
        let used = choose(spec, at, offered, back_end.needs()).with_context(|| path.to_string())?;
        back_end.accept(used).with_context(refused)?;
        if pairs > 1 {
            let there = back_end.num_queues().with_context(refused)?;
            ensure!(there >= pairs.into(), "{path} has {there} queues, fewer than --queue-pairs {pairs}");
        }
        let mut ram = memory(spec.memory(), spec.base.hugepages)?;
        back_end.share(&ram).with_context(refused)?;
        let mut ports = Vec::new();
        for (pair, call) in calls.iter().enumerate() {
            let full = "guest memory is used up; lower --ring-size, --size or --queue-pairs";
            let mut rings = Vec::new();
            for ring in [pair * 2, pair * 2 + 1] {
                let config = lay_out(spec, used, &mut ram).context(full)?;
                let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
                // One call for all rings of a thread: it waits for all of them at once.
                let events = (kick, call.try_clone()?);
                back_end.set_up(ring, &config, &events).with_context(|| {
                    format!("{path} refused ring {ring} of {} descriptors; lower --ring-size", config.size)
                })?;
                rings.push((config, events.0));
            }
            let [rx, tx] = <[_; 2]>::try_from(rings).map_err(|_| anyhow!("two rings"))?;
            let rx = Rx::new(spec, used, &mut ram, rx).context(full)?;
            let tx = Tx::new(spec, used, &mut ram, tx).context(full)?;
            ports.push(Port { map: Arc::clone(ram.map()), rx, tx });
        }
        back_end.start().with_context(refused)?;
        self.back_ends.push(back_end);
        self.negotiated.push(Negotiated { offered, used });
        Ok(ports)
    }
}

/// The features to use.
fn choose(spec: &NetSpec, port: usize, offered: u64, needs: (u64, &'static str)) -> Result<u64> {
    if offered & BLK_SIZE != 0 && offered & (CSUM | CTRL_VQ | MQ | MRG_RXBUF) == 0 {
        bail!("looks like a block device (it offers VIRTIO_BLK_F_BLK_SIZE); vbench run drives those");
    }
    let direction = spec.direction;
    let gso = spec.load.size.gso();
    let mut needed = vec![(features::VERSION_1, "VIRTIO_F_VERSION_1"), needs];
    if spec.base.indirect {
        needed.push((features::INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC (--indirect)"));
    }
    if spec.base.packed {
        needed.push((features::RING_PACKED, "VIRTIO_F_RING_PACKED (--packed)"));
    }
    if gso && direction.sends(port) {
        needed.push((CSUM, "VIRTIO_NET_F_CSUM (--size gso)"));
        needed.push((HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4 (--size gso)"));
    }
    let receives =
        direction.returns() && (0..direction.ports()).any(|p| direction.sends(p) && direction.to(p) == port);
    if gso && receives {
        needed.push((GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM (--size gso)"));
        needed.push((GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4 (--size gso)"));
    }
    let missing: Vec<_> =
        needed.iter().filter(|(bit, _)| offered & bit == 0).map(|(_, name)| *name).collect();
    ensure!(missing.is_empty(), "the back end does not offer {}", missing.join(" and "));
    let mut used = needed.iter().fold(0, |all, (bit, _)| all | bit);
    used |= if spec.base.no_event_idx { 0 } else { offered & features::EVENT_IDX };
    used |= if spec.load.mrg_rxbuf == 1 { offered & MRG_RXBUF } else { 0 };
    // What goes with it, CTRL_VQ, tells the number of pairs to devices of which the front end does not start rings.
    used |= if spec.load.queue_pairs > 1 { offered & MQ } else { 0 };
    Ok(used)
}

/// Removes a socket file that was made here.
struct Made<'a>(&'a Path);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// Listens at all sockets until a back end has connected to each.
fn accept(spec: &NetSpec) -> Result<Vec<UnixStream>> {
    let mut listeners = Vec::new();
    for path in &spec.sockets {
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen at {}; if nobody does, remove it", path.display()))?;
        listener.set_nonblocking(true)?;
        listeners.push((listener, Made(path)));
    }
    let begun = Instant::now();
    let mut streams = Vec::new();
    for (listener, made) in &listeners {
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).with_context(|| format!("cannot accept at {}", made.0.display())),
            }
            if begun.elapsed() > PATIENCE {
                bail!("no back end has connected to {} within {} s", made.0.display(), PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_nonblocking(false)?;
        streams.push(stream);
    }
    Ok(streams)
}
