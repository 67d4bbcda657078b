//! A network card as an ordinary user of the `vhost-user-backend` and `virtio-queue` crates writes one: with one
//! socket it sends everything back with the MAC addresses swapped, with two it is the wire between them. A peer to
//! measure beside, with nothing done to make it fast or slow; and one that does what it should not, to see that that
//! is found.

use std::io::Result;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::Context;
use poll_engine::device::features;
use poll_engine::engine::placement::pin_to;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::frame::VNET;
use super::session::net_features::MRG_RXBUF;
use crate::plain::{drain, other};

const MAX_QUEUE_SIZE: usize = 1024;
type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A card to serve.
#[derive(Clone, Debug, clap::Args)]
pub struct PlainNet {
    /// Socket to listen on; twice for two ports that are connected
    #[arg(long, value_name = "PATH", required = true, num_args = 1)]
    socket_path: Vec<PathBuf>,
    /// Connect to the sockets, where the front end listens, instead of listening there
    #[arg(long)]
    client: bool,
    /// CPU to run on
    #[arg(long, value_name = "CPU")]
    cpu: Option<usize>,
    /// Do something wrong with every N-th packet: drop, duplicate, corrupt (one bit of its last byte), or swap it with
    /// the one before
    #[arg(long, value_name = "KIND:N")]
    fault: Option<Fault>,
}

/// What is done wrong, and to which packets.
#[derive(Clone, Copy, Debug)]
struct Fault {
    kind: Kind,
    every: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Drop,
    Duplicate,
    Corrupt,
    Swap,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Fault, String> {
        let bad = || format!("'{s}' is not drop, duplicate, corrupt or swap with :N, N from 2 on");
        let (kind, every) = s.split_once(':').ok_or_else(bad)?;
        let kind = match kind {
            "drop" => Kind::Drop,
            "duplicate" => Kind::Duplicate,
            "corrupt" => Kind::Corrupt,
            "swap" => Kind::Swap,
            _ => return Err(bad()),
        };
        let every = every.parse().ok().filter(|n| *n >= 2).ok_or_else(bad)?;
        Ok(Fault { kind, every })
    }
}

/// Where packets for a port go.
#[derive(Default)]
struct Inbox {
    /// Its memory and its receiveq, once it runs.
    running: Option<(Memory, VringRwLock)>,
}

type Inboxes = Arc<Vec<Mutex<Inbox>>>;

/// Serves one front end after another at each socket for ever.
pub fn serve(what: &PlainNet) -> anyhow::Result<()> {
    anyhow::ensure!(what.socket_path.len() <= 2, "plain-net has one port or two");
    if let Some(cpu) = what.cpu {
        // The crate's threads are started by this one, and run where it runs.
        pin_to(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
    }
    let inboxes: Inboxes = Arc::new(what.socket_path.iter().map(|_| Mutex::default()).collect());
    let ports = what.socket_path.iter().enumerate().map(|(index, path)| {
        let (path, fault, client, inboxes) = (path.clone(), what.fault, what.client, Arc::clone(&inboxes));
        std::thread::spawn(move || -> anyhow::Result<()> {
            // One for all: who comes between two sessions waits.
            let mut listener = (!client).then(|| Listener::new(&path, true)).transpose()?;
            loop {
                let memory = Memory::new(GuestMemoryMmap::new());
                let port = Port {
                    memory: memory.clone(),
                    event_idx: false,
                    index,
                    inboxes: Arc::clone(&inboxes),
                    fault,
                    count: 0,
                    held: None,
                };
                let mut daemon = VhostUserDaemon::new("plain".into(), Arc::new(RwLock::new(port)), memory)
                    .map_err(|e| anyhow::anyhow!("cannot set the daemon up: {e}"))?;
                let served = match &mut listener {
                    None => daemon.start_client(&path.to_string_lossy()).and_then(|()| daemon.wait()),
                    Some(listener) => daemon.start(listener).and_then(|()| daemon.wait()),
                };
                daemon.get_epoll_handlers().iter().for_each(|handler| handler.send_exit_event());
                if let Err(e) = served {
                    // Also how a session ends that is closed in the middle of something.
                    eprintln!("vbench: serving {}: {e}", path.display());
                }
                if client {
                    // Nobody would listen again.
                    return Ok(());
                }
                lock(&inboxes[index]).running = None;
            }
        })
    });
    for port in ports.collect::<Vec<_>>() {
        port.join().map_err(|_| anyhow::anyhow!("a port panicked"))??;
    }
    Ok(())
}

fn lock(inbox: &Mutex<Inbox>) -> std::sync::MutexGuard<'_, Inbox> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Port {
    memory: Memory,
    event_idx: bool,
    index: usize,
    inboxes: Inboxes,
    fault: Option<Fault>,
    /// Packets seen.
    count: u64,
    /// One that waits for the next, to come after it.
    held: Option<Vec<u8>>,
}

impl Port {
    /// Takes all packets of the transmitq and delivers them; whether there was one.
    fn process(&mut self, vring: &VringRwLock) -> Result<bool> {
        let memory = self.memory.memory();
        let chains: Vec<_> = {
            let mut state = vring.get_mut();
            state.get_queue_mut().iter(memory.clone()).map_err(other)?.collect()
        };
        if chains.is_empty() {
            return Ok(false);
        }
        let mut packets = Vec::with_capacity(chains.len());
        for chain in chains {
            let head = chain.head_index();
            let mut packet = Vec::new();
            for descriptor in chain.readable() {
                let at = packet.len();
                packet.resize(at + descriptor.len() as usize, 0);
                memory.read_slice(&mut packet[at..], descriptor.addr()).map_err(other)?;
            }
            self.pass(packet, &mut packets);
            vring.add_used(head, 0).map_err(other)?;
        }
        self.deliver(packets)?;
        if vring.needs_notification().map_err(other)? {
            vring.signal_used_queue()?;
        }
        Ok(true)
    }

    /// Does to a packet what is to be done.
    fn pass(&mut self, mut packet: Vec<u8>, packets: &mut Vec<Vec<u8>>) {
        if self.inboxes.len() == 1 && packet.len() >= VNET + 12 {
            packet[VNET..VNET + 12].rotate_left(6);
        }
        self.count += 1;
        let kind = self.fault.filter(|f| self.count.is_multiple_of(f.every)).map(|f| f.kind);
        match kind {
            Some(Kind::Drop) => return,
            Some(Kind::Duplicate) => packets.push(packet.clone()),
            Some(Kind::Corrupt) => {
                if let Some(last) = packet.last_mut() {
                    *last ^= 0x10;
                }
            }
            Some(Kind::Swap) => {
                self.held = Some(packet);
                return;
            }
            None => {}
        }
        packets.push(packet);
        packets.extend(self.held.take());
    }

    /// Writes packets into the receiveq of the port that they are for; drops those that it has no room for.
    fn deliver(&self, packets: Vec<Vec<u8>>) -> Result<()> {
        let to = (self.index + 1) % self.inboxes.len();
        let inbox = lock(&self.inboxes[to]);
        let Some((memory, vring)) = &inbox.running else { return Ok(()) };
        let memory = memory.memory();
        let mut any = false;
        for mut packet in packets {
            let next = vring.get_mut().get_queue_mut().iter(memory.clone()).map_err(other)?.next();
            let Some(chain) = next else { break };
            any = true;
            // One buffer, and its header says so (virtio 1.3, 5.1.6.4.1).
            if let Some(buffers) = packet.get_mut(10..12) {
                buffers.copy_from_slice(&1u16.to_le_bytes());
            }
            let (head, mut written) = (chain.head_index(), 0);
            for descriptor in chain.writable() {
                let n = (packet.len() - written).min(descriptor.len() as usize);
                memory.write_slice(&packet[written..written + n], descriptor.addr()).map_err(other)?;
                written += n;
            }
            vring.add_used(head, written as u32).map_err(other)?;
        }
        if any && vring.needs_notification().map_err(other)? {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Port {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        features::VERSION_1
            | features::INDIRECT_DESC
            | features::EVENT_IDX
            | MRG_RXBUF
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> Result<()> {
        if events != EventSet::IN {
            return Err(other("an unexpected event"));
        }
        let [rx, tx] = vrings else { return Err(other("two queues")) };
        // Whichever of them is kicked first: both are set up by then.
        lock(&self.inboxes[self.index]).running.get_or_insert_with(|| (self.memory.clone(), rx.clone()));
        if queue == 0 {
            // There are buffers; further kicks for them are of no use.
            rx.disable_notification().map_err(other)?;
            return Ok(());
        }
        drain(tx, self.event_idx, || self.process(tx))
    }
}
