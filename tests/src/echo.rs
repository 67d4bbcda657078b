//! A network card that is connected to itself, on the same engine as the daemons.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use poll_engine::device::{ConfigRefused, Device, QueueHandler};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;

use crate::scene::Scene;

/// `VIRTIO_NET_F_MRG_RXBUF`.
pub const MRG_RXBUF: u64 = 1 << 15;
/// `num_buffers` in `struct virtio_net_hdr`: every packet goes into one.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// Packets on their way from the transmit to the receive queue.
type Packets = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// A card that is connected to itself.
#[derive(Default)]
struct Echo {
    packets: Packets,
    agreed: Arc<AtomicU64>,
}

impl Device for Echo {
    fn features(&self) -> u64 {
        MRG_RXBUF
    }
    fn completes_in_order(&self) -> bool {
        true
    }
    fn num_queues(&self) -> u16 {
        2
    }
    fn max_ring_size(&self) -> u16 {
        1024
    }
    fn read_config(&self, _: u32, into: &mut [u8]) {
        into.fill(0);
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused { offset, end: offset + bytes.len() as u32 })
    }
    fn start_queue(&self, index: u16, features: u64, _: u16) -> io::Result<Box<dyn QueueHandler>> {
        self.agreed.store(features, Ordering::Relaxed);
        Ok(Box::new(Side { transmits: index % 2 == 1, packets: Arc::clone(&self.packets) }))
    }
    fn reset(&self) {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

struct Side {
    transmits: bool,
    packets: Packets,
}

impl QueueHandler for Side {
    fn attach(&mut self, _: &mut Io<'_>) {}

    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        let mut packets = self.packets.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.transmits && packets.is_empty() {
            return 0;
        }
        let mut done = 0;
        for _ in 0..queue.ready() {
            if !self.transmits && packets.is_empty() {
                break;
            }
            let Some(request) = queue.take() else { break };
            let chain = queue.chain();
            let written = if self.transmits {
                let mut bytes = vec![0; chain.readable_len() as usize];
                chain.readable(0, u32::MAX).read(&mut bytes);
                if let Some(number) = bytes.get_mut(NUM_BUFFERS) {
                    number.copy_from_slice(&1u16.to_le_bytes());
                }
                packets.push_back(bytes);
                0
            } else {
                let packet = packets.pop_front().unwrap_or_default();
                chain.writable(0, u32::MAX).write(&packet) as u32
            };
            queue.complete(request, written);
            done += 1;
        }
        done
    }

    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}

    fn detach(&mut self, _: &mut Io<'_>) {}
}

/// The card, served for as long as this is kept.
#[derive(Debug)]
pub struct Card {
    /// Where.
    pub socket: PathBuf,
    /// Counters of its receive and its transmit queue.
    pub stats: Vec<Arc<QueueStats>>,
    agreed: Arc<AtomicU64>,
    _server: Server,
}

impl Card {
    /// The features that a driver has agreed on, once its queues run.
    pub fn agreed(&self) -> u64 {
        self.agreed.load(Ordering::Relaxed)
    }

    /// Serves a card at a socket of the test's.
    pub fn serve(scene: &Scene) -> Result<Card> {
        let socket = scene.path("card.sock");
        // One queue is woken by the other, which only a reactor that never sleeps does without a wake-up of its own.
        let engine =
            Arc::new(Engine::start(&EngineConfig { pacing: Pacing::Busy, ..EngineConfig::default() })?);
        let echo = Echo::default();
        let agreed = Arc::clone(&echo.agreed);
        let stats: Vec<Arc<QueueStats>> = (0..2).map(|_| Arc::default()).collect();
        let export = Export { name: "echo".into(), device: Arc::new(echo), stats: stats.clone(), engine };
        let server = Server::start(export, Listener::bind(&socket)?, || {})?;
        Ok(Card { socket, stats, agreed, _server: server })
    }
}
