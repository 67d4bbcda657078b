//! What a device is to the engine: features, a configuration space, and handlers for its queues.
//!
//! A device knows neither its transport (vhost-user, VDUSE) nor the ring format; a handler sees chains of bytes.

use std::io;
use std::time::Duration;

use crate::engine::queue::Queue;
use crate::engine::reactor::Io;
use crate::memory::map::MemoryMap;
use crate::ring::inflight::Memento;
use crate::uring::FixedBuffers;

/// Features every transport negotiates for all devices (virtio 1.3, chapter 6).
pub mod features {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_ACCESS_PLATFORM`.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// `VIRTIO_F_RING_PACKED`.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_IN_ORDER`: buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// `VIRTIO_F_RING_RESET`: a queue can be reset alone (2.6.1). Over vhost-user that is stopping it, by `GET_VRING_BASE`
    /// or by disabling it, and setting it up anew.
    pub const RING_RESET: u64 = 1 << 40;
    /// All that the engine implements for every device.
    pub const ENGINE: u64 =
        INDIRECT_DESC | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM | RING_PACKED | RING_RESET;
}

/// Why a write to configuration space is refused.
#[derive(Debug, thiserror::Error)]
#[error("configuration bytes {offset}..{end} are not writable")]
pub struct ConfigRefused {
    /// First byte of the write.
    pub offset: u32,
    /// One past the last.
    pub end: u32,
}

/// Why a state is not taken.
#[derive(Debug, thiserror::Error)]
#[error("the state that came with the guest is not this device's: {0}")]
pub struct StateRefused(pub String);

/// What a front end may ask of a network device besides.
pub trait Network {
    /// The guest of this address has come here from another host and does not say so itself: those that frames for it come
    /// from are to learn where it is. Never waits.
    fn announce(&self, mac: [u8; 6]);

    /// The guest's driver keeps to this MTU, which the front end has set: what is wrong with it.
    fn set_mtu(&self, mtu: u64) -> Result<(), String>;
}

/// A virtio device.
pub trait Device: Send + Sync {
    /// The device's own feature bits; the transport adds those of the rings.
    fn features(&self) -> u64;

    /// Whether its handlers complete requests in the order in which they take them, whatever happens: what
    /// [`features::IN_ORDER`] promises to the driver.
    fn completes_in_order(&self) -> bool {
        false
    }

    /// Features of the engine that are not to be offered with this device.
    fn withheld_features(&self) -> u64 {
        0
    }

    /// How many queues it has at most.
    fn num_queues(&self) -> u16;

    /// The largest ring it takes.
    fn max_ring_size(&self) -> u16;

    /// Copies configuration space from `offset` on; bytes beyond its end read as zero.
    fn read_config(&self, offset: u32, into: &mut [u8]);

    /// A driver's write to configuration space.
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused>;

    /// Goes on as a device of another process that showed the guest `config`: takes over what changes in operation, and
    /// says what else differs. Its [state](Self::save_state) has been loaded before. No queue runs.
    fn adopt_config(&self, config: &[u8]) -> Result<(), String> {
        let mut ours = vec![0; config.len()];
        self.read_config(0, &mut ours);
        match ours.iter().zip(config).position(|(a, b)| a != b) {
            Some(at) => {
                Err(format!("byte {at} of its configuration space would be {}, not {}", ours[at], config[at]))
            }
            None => Ok(()),
        }
    }

    /// What a device of another host, or of the process that takes over from this one, needs, besides the guest's memory and its queues, to go on as this one: a few bytes
    /// (4096 at most), whose form is the device's own and has a version. `None`: nothing. It stays as it is here, for the
    /// guest may come back.
    fn save_state(&self) -> Option<Vec<u8>> {
        None
    }

    /// Goes on with what [`save_state`](Self::save_state) has given at the source; anything else, which may be any bytes,
    /// is refused and changes nothing. No queue runs.
    fn load_state(&self, _state: &[u8]) -> Result<(), StateRefused> {
        Err(StateRefused("it has none".into()))
    }

    /// The first queue is about to run: what the device may not share with anybody must be its own from here on. The
    /// session ends when that fails, so that the front end may try again.
    fn acquire(&self) -> io::Result<()> {
        Ok(())
    }

    /// The last queue has stopped in a guest that migrates: it may go on elsewhere from here on, or here again.
    /// Everything written must be there for whoever comes next.
    fn hand_over(&self) {}

    /// A process that had gone on with this device in our place has died. Returns once nothing that it had begun can touch
    /// the device or guest memory any more; an error means that this cannot be known.
    fn reclaim(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes the handler of a queue that is about to run, under the features that were negotiated.
    fn start_queue(&self, index: u16, features: u64, ring_size: u16) -> io::Result<Box<dyn QueueHandler>>;

    /// On which reactor a queue is to run, counted round those there are; `None`: on the one with the fewest queues. A
    /// device that has places for its queues is not offered to guests that come before their memory (post-copy).
    fn place(&self, _index: u16) -> Option<usize> {
        None
    }

    /// On the reactor of which number somebody wants a queue to run; asked for when the queue starts. It says more than
    /// [`place`](Self::place), as long as that reactor is there.
    fn reactor(&self, _index: u16) -> Option<usize> {
        None
    }

    /// The node of the host's memory that what is behind it is on, if that is known.
    fn node(&self) -> Option<usize> {
        None
    }

    /// The device is reset, or its front end is gone. No queue runs. A front end that keeps a copy of configuration space
    /// (QEMU does) shows that to its guest afterwards as well, and resets at times when the guest does not know of it: what
    /// a driver relies on in there must hold.
    fn reset(&self);

    /// It is a network device.
    fn network(&self) -> Option<&dyn Network> {
        None
    }

    /// The first queue is about to run. What the process that comes after this one if it is killed has to know of what the
    /// driver has set has its place here, in the record of requests in flight: what an earlier one has left there counts,
    /// unless it is nonsense (the front end may have written it), and the device writes there when that changes, before
    /// the driver hears that it has. `None`: there is no such place, or not any more.
    fn keep(&self, _memento: Option<Memento>) {}
}

/// The device's side of one running queue. It lives on one reactor and is never called concurrently.
pub trait QueueHandler: Send {
    /// Called once on the reactor, before anything else.
    fn attach(&mut self, io: &mut Io<'_>);

    /// Takes what is ready, a bounded amount of it; returns how many requests (or other pieces of work) that was.
    fn poll(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize;

    /// Goes on with the requests that are in flight, in the place of [`poll`](Self::poll) while the queue takes no chains: for
    /// a handler that hears of their ends elsewhere than from [`complete`](Self::complete). Returns how many have ended.
    fn go_on(&mut self, _queue: &mut Queue, _io: &mut Io<'_>) -> usize {
        0
    }

    /// The reactor is about to sleep: an operation is to wait for whatever else this handler waits for. True if there is
    /// work to be done instead.
    fn prepare_sleep(&mut self, _io: &mut Io<'_>) -> bool {
        false
    }

    /// One of the handler's own operations is complete.
    fn complete(&mut self, queue: &mut Queue, io: &mut Io<'_>, tag: u32, result: i32);

    /// Called once on the reactor, after the last request has been completed.
    fn detach(&mut self, io: &mut Io<'_>);

    /// Whether chains that the driver makes available are work, which wakes a reactor that sleeps: buffers to receive into
    /// are none while there is nothing to receive.
    fn wants_chains(&self) -> bool {
        true
    }

    /// How long the reactor may sleep if nothing wakes it, for a handler that leaves chains where they are for a while.
    /// `None`: for ever.
    fn longest_sleep(&self) -> Option<Duration> {
        None
    }

    /// Whether the handler's I/O gains from guest memory that is registered with io_uring.
    fn uses_fixed_buffers(&self) -> bool {
        false
    }

    /// Guest memory is this from now on, for a handler that registers it with a ring of its own.
    fn register_memory(&mut self, _mode: FixedBuffers, _map: &MemoryMap) {}
}
