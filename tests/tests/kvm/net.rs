//! A network card: the harness has them too. What serves it is an echo of this file, on the same engine as the daemons.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;
use poll_engine::device::{ConfigRefused, Device, QueueHandler};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;

/// Packets on their way from the transmit to the receive queue.
type Packets = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// A card that is connected to itself.
#[derive(Default)]
struct Echo(Packets);

impl Device for Echo {
    fn features(&self) -> u64 {
        0
    }
    fn num_queues(&self) -> u16 {
        2
    }
    fn max_ring_size(&self) -> u16 {
        256
    }
    fn read_config(&self, _: u32, into: &mut [u8]) {
        into.fill(0);
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused { offset, end: offset + bytes.len() as u32 })
    }
    fn start_queue(&self, index: u16, _: u64, _: u16) -> io::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Side { transmits: index % 2 == 1, packets: Arc::clone(&self.0) }))
    }
    fn reset(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
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

struct Card {
    socket: PathBuf,
    _server: Server,
}

impl Card {
    fn serve(scene: &Scene) -> Result<Card> {
        let socket = scene.path("card.sock");
        // One queue is woken by the other, which only a reactor that never sleeps does without a wake-up of its own.
        let engine =
            Arc::new(Engine::start(&EngineConfig { pacing: Pacing::Busy, ..EngineConfig::default() })?);
        let stats = (0..2).map(|_| Arc::default()).collect();
        let export = Export { name: "echo".into(), device: Arc::new(Echo::default()), stats, engine };
        let server = Server::start(export, Listener::bind(&socket)?, || {})?;
        Ok(Card { socket, _server: server })
    }
}

/// Packets of all sizes are sent and come back as they were.
pub fn echo(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let card = Card::serve(scene)?;
    let mut guest = Plan::new().nic(&card.socket).boot(platform, scene)?;
    for (bytes, wait) in
        [(60, Wait::Poll), (256, Wait::Sleep), (1514, Wait::Sleep), (1514, Wait::EveryInterrupt)]
    {
        let outcome = guest.run(&Load::new(Op::Echo).block_size(bytes).requests(2000).wait(wait))?;
        outcome.expect_clean()?;
        ensure!(outcome.requests == 2000, "{outcome:?}");
    }
    guest.power_off()?;
    Ok(None)
}

/// Devices of two kinds in one guest.
pub fn with_disk(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let card = Card::serve(scene)?;
    let image = Image::create(scene, "disk.img", 16 * MIB)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = Plan::new().disk(daemon.socket(), 2).nic(&card.socket).boot(platform, scene)?;
    for seed in 0..3 {
        guest.run(&Load::verified().seed(seed).requests(200))?.expect_clean()?;
        guest.run(&Load::new(Op::Echo).on(&[1]).block_size(500).requests(200))?.expect_clean()?;
    }
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}
