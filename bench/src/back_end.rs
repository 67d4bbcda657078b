//! A device to be driven, whichever way leads to it: a vhost-user socket ([`Socket`], by the `vhost` crate's half of the
//! protocol), or a node of the kernel's ([`Node`](crate::node::Node)).

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};
use poll_engine::memory::Ram;
use poll_engine::ring::RingConfig;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::EventFd;

use crate::front_end::{set_up, share};

/// `VHOST_USER_GET_QUEUE_NUM`.
const GET_QUEUE_NUM: u32 = 17;

/// A device, in the order of these calls; none of the errors names it.
pub trait BackEnd {
    /// A feature that this way needs for itself, and its name.
    fn needs(&self) -> (u64, &'static str);

    /// The features that are offered.
    fn offered(&mut self) -> Result<u64>;

    /// Accepts these.
    fn accept(&mut self, features: u64) -> Result<()>;

    /// How many queues there are.
    fn num_queues(&mut self) -> Result<u64>;

    /// The beginning of configuration space.
    fn config(&mut self, len: u32) -> Result<Vec<u8>>;

    /// Lets the device use this memory, and no other.
    fn share(&mut self, ram: &Ram) -> Result<()>;

    /// Has requests in flight recorded, of so many queues of at most this size.
    fn record(&mut self, queues: u16, ring_size: u16) -> Result<()>;

    /// Sets a queue up, with its kick and call.
    fn set_up(&mut self, index: usize, config: &RingConfig, events: &(EventFd, EventFd)) -> Result<()>;

    /// All queues are set up: begins.
    fn start(&mut self) -> Result<()>;

    /// Hangs up when the device is gone.
    fn fd(&self) -> RawFd;
}

/// A connected vhost-user socket.
pub struct Socket {
    front: Frontend,
    raw: UnixStream,
    wanted: VhostUserProtocolFeatures,
    used: VhostUserProtocolFeatures,
}

impl Socket {
    /// With so many queues to be used, and protocol features that are used if they are there.
    pub fn new(stream: UnixStream, queues: u64, wanted: VhostUserProtocolFeatures) -> Result<Socket> {
        let raw = stream.try_clone()?;
        let front = Frontend::from_stream(stream, queues);
        Ok(Socket { front, raw, wanted, used: VhostUserProtocolFeatures::empty() })
    }
}

impl BackEnd for Socket {
    fn needs(&self) -> (u64, &'static str) {
        (VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), "VHOST_USER_F_PROTOCOL_FEATURES")
    }

    fn offered(&mut self) -> Result<u64> {
        self.front.set_owner()?;
        Ok(self.front.get_features()?)
    }

    fn accept(&mut self, features: u64) -> Result<()> {
        self.front.set_features(features)?;
        self.used = self.front.get_protocol_features()? & self.wanted;
        Ok(self.front.set_protocol_features(self.used)?)
    }

    fn num_queues(&mut self) -> Result<u64> {
        if !self.used.contains(VhostUserProtocolFeatures::MQ) {
            return Ok(1);
        }
        // Some cards say how many rings they have, some how many pairs; the crate takes it for the number of rings.
        let header = [GET_QUEUE_NUM, 1, 0].map(u32::to_le_bytes).concat();
        self.raw.write_all(&header)?;
        let mut reply = [0; 20];
        self.raw.read_exact(&mut reply)?;
        let (head, number) = reply.split_at(12);
        ensure!(head[..4] == header[..4] && head[8..] == [8, 0, 0, 0], "an answer of another form");
        Ok(u64::from_le_bytes(number.try_into()?))
    }

    fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        if !self.used.contains(VhostUserProtocolFeatures::CONFIG) {
            bail!("it has no configuration space (no protocol feature CONFIG)");
        }
        let nothing = vec![0; len as usize];
        Ok(self.front.get_config(0, len, VhostUserConfigFlags::empty(), &nothing)?.1)
    }

    fn share(&mut self, ram: &Ram) -> Result<()> {
        Ok(share(&self.front, ram)?)
    }

    /// In memory that the back end makes and keeps mapped.
    fn record(&mut self, queues: u16, ring_size: u16) -> Result<()> {
        if !self.used.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            bail!("it does not offer INFLIGHT_SHMFD; run without --inflight");
        }
        let (made, file) = self.front.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, ring_size))?;
        self.front.set_inflight_fd(&made, file.as_raw_fd()).context("SET_INFLIGHT_FD")
    }

    fn set_up(&mut self, index: usize, config: &RingConfig, events: &(EventFd, EventFd)) -> Result<()> {
        Ok(set_up(&mut self.front, index, config, events)?)
    }

    /// Queues run from when they are set up.
    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    fn fd(&self) -> RawFd {
        self.front.as_raw_fd()
    }
}
