//! The kernel's half of VDUSE, as drivers/vdpa/vdpa_user/vduse_dev.c of Linux 6.12 behaves, at the system calls' edge:
//! it takes structures apart byte by byte.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vdpa::vduse::edge::Edge;
use vdpa::vduse::uapi::{DevRequest, DevResponse};
use zerocopy::{FromBytes, IntoBytes};

pub const DRIVER_OK: u8 = 4;

#[derive(Default)]
pub struct FakeQueue {
    pub num: u32,
    pub addrs: [u64; 3],
    pub state: [u16; 4],
    pub ready: bool,
    pub kick: Option<OwnedFd>,
    pub kicked: bool,
    pub max_size: u16,
    pub interrupts: usize,
}

pub struct Translation {
    pub start: u64,
    pub last: u64,
    pub offset: u64,
    pub perm: u8,
    pub file: File,
}

#[derive(Default)]
pub struct Device {
    pub version: Option<u64>,
    /// name, id, features, queues, configuration space.
    pub created: Option<(String, u32, u64, u32, Vec<u8>)>,
    pub destroyed: Vec<String>,
    pub refuses: Option<i32>,
    pub driver_features: u64,
    pub status: u8,
    pub queues: Vec<FakeQueue>,
    pub table: Vec<Translation>,
    pub requests: VecDeque<DevRequest>,
    /// Those that were read and not answered.
    pub unanswered: Vec<DevRequest>,
    pub answers: HashMap<u32, DevResponse>,
    pub config: Vec<u8>,
    pub config_interrupts: usize,
    /// Bytes that can be put behind the translations from 0 on.
    pub bounce: u64,
    pub umem: Option<(u64, u64, u64)>,
    /// Before Linux 6.0 there is no asking about memory to bounce through.
    pub knows_no_info: bool,
    /// Of network devices; Linux up to 7.2 does not.
    pub takes_control_queues: bool,
    /// Requests come in part only.
    pub cuts_requests: bool,
    /// What every question for a translation is answered with, whatever it is: offset, first, last, permission.
    pub lie: Option<(u64, u64, u64, u8)>,
    next: u32,
}

pub struct Kernel {
    device: Mutex<Device>,
    bell: EventFd,
}

#[derive(Clone)]
pub struct FakeEdge(pub Arc<Kernel>);

impl std::fmt::Debug for FakeEdge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a kernel of the test's")
    }
}

impl Kernel {
    pub fn new(queues: usize, features: u64) -> Arc<Kernel> {
        let mut device = Device { driver_features: features, config: vec![0; 60], ..Device::default() };
        device.queues.resize_with(queues, FakeQueue::default);
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        Arc::new(Kernel { device: Mutex::new(device), bell })
    }

    /// The node opened. What was read through an earlier opening and not answered is to be read again, as of
    /// `vduse_dev_release` on.
    pub fn edge(self: &Arc<Kernel>) -> Box<dyn Edge> {
        let mut device = self.lock();
        for request in std::mem::take(&mut device.unanswered).into_iter().rev() {
            device.requests.push_front(request);
        }
        drop(device);
        Box::new(FakeEdge(Arc::clone(self)))
    }

    pub fn lock(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap()
    }

    /// Sends a request and does not wait.
    pub fn post(&self, kind: u32, payload: &[u32]) -> u32 {
        let mut device = self.lock();
        device.next += 1;
        let mut request = DevRequest { kind, id: device.next, reserved: [0; 4], payload: [0; 32] };
        request.payload[..payload.len()].copy_from_slice(payload);
        device.requests.push_back(request);
        self.bell.write(1).unwrap();
        request.id
    }

    pub fn answer(&self, id: u32) -> DevResponse {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(answer) = self.lock().answers.remove(&id) {
                return answer;
            }
            assert!(Instant::now() < deadline, "request {id} is not answered");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn ask(&self, kind: u32, payload: &[u32]) -> DevResponse {
        self.answer(self.post(kind, payload))
    }

    /// `vduse_vdpa_set_status` and `vduse_vdpa_reset`.
    pub fn set_status(&self, status: u8) -> bool {
        let done = self.ask(1, &[status.into()]).result == 0;
        let mut device = self.lock();
        if status == 0 {
            device.status = 0;
            for q in &mut device.queues {
                *q = FakeQueue { max_size: q.max_size, interrupts: q.interrupts, ..FakeQueue::default() };
            }
        } else if done {
            device.status = status;
        }
        done
    }

    pub fn update_iotlb(&self, start: u64, last: u64) -> bool {
        self.ask(2, &[start as u32, (start >> 32) as u32, last as u32, (last >> 32) as u32]).result == 0
    }

    pub fn vq_state(&self, index: u32) -> Option<[u16; 4]> {
        let answer = self.ask(0, &[index]);
        let p = &answer.payload;
        (answer.result == 0 && p[0] == index)
            .then(|| [p[1] as u16, (p[1] >> 16) as u16, p[2] as u16, (p[2] >> 16) as u16])
    }

    /// `vduse_vq_kick`.
    pub fn kick(&self, index: usize) {
        let mut device = self.lock();
        let queue = &mut device.queues[index];
        match &queue.kick {
            _ if !queue.ready => {}
            Some(fd) => {
                nix::unistd::write(fd, &1u64.to_ne_bytes()).unwrap();
            }
            None => queue.kicked = true,
        }
    }

    pub fn map(&self, start: u64, len: u64, offset: u64, perm: u8, file: &File) {
        let file = file.try_clone().unwrap();
        self.lock().table.push(Translation { start, last: start + (len - 1), offset, perm, file });
    }
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}
fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Edge for FakeEdge {
    fn ioctl(&self, number: u64, s: &mut [u8]) -> io::Result<()> {
        let mut d = self.0.lock();
        if let Some(code) = d.refuses {
            return Err(error(code));
        }
        match (number >> 8 & 0xff, number & 0xff) {
            (0x81, 1) => d.version = Some(long(s, 0)),
            (0x81, 2) => {
                if d.version != Some(0) {
                    return Err(error(libc::EINVAL));
                }
                let name = s[..256].split(|&b| b == 0).next().unwrap();
                let (id, features) = (word(s, 260), long(s, 264));
                // Reserved words, and ACCESS_PLATFORM.
                if s[280..332].iter().any(|&b| b != 0) || features & 1 << 33 == 0 {
                    return Err(error(libc::EINVAL));
                }
                // `features_is_valid`: VERSION_1 of a network device, and no CTRL_VQ.
                let refused = !d.takes_control_queues && features & 1 << 17 != 0;
                if id == 1 && (refused || features & 1 << 32 == 0) {
                    return Err(error(libc::EINVAL));
                }
                let config = s[336..][..word(s, 332) as usize].to_vec();
                d.config.clone_from(&config);
                d.created = Some((String::from_utf8_lossy(name).into(), id, features, word(s, 272), config));
            }
            (0x81, 3) => {
                let name = s[..256].split(|&b| b == 0).next().unwrap();
                d.destroyed.push(String::from_utf8_lossy(name).into());
            }
            (0x81, 0x11) => s[..8].copy_from_slice(&d.driver_features.to_ne_bytes()),
            (0x81, 0x12) => {
                let (offset, len) = (word(s, 0) as usize, word(s, 4) as usize);
                if len == 0 || offset + len > d.config.len() {
                    return Err(error(libc::EINVAL));
                }
                d.config[offset..offset + len].copy_from_slice(&s[8..8 + len]);
            }
            (0x81, 0x13) => {
                if d.status & DRIVER_OK == 0 {
                    return Err(error(libc::EINVAL));
                }
                d.config_interrupts += 1;
            }
            (0x81, 0x14) => {
                let size = u16::from_ne_bytes([s[4], s[5]]);
                assert!(s[6..32].iter().all(|&b| b == 0));
                d.queues.get_mut(word(s, 0) as usize).ok_or(error(libc::EINVAL))?.max_size = size;
            }
            (0x81, 0x15) => {
                let q = d.queues.get(word(s, 0) as usize).ok_or(error(libc::EINVAL))?;
                s[4..8].copy_from_slice(&q.num.to_ne_bytes());
                for (i, addr) in q.addrs.iter().enumerate() {
                    s[8 + 8 * i..16 + 8 * i].copy_from_slice(&addr.to_ne_bytes());
                }
                s[32..40].copy_from_slice(q.state.as_bytes());
                s[40] = q.ready.into();
            }
            (0x81, 0x16) => {
                let fd = word(s, 4) as i32;
                let q = d.queues.get_mut(word(s, 0) as usize).ok_or(error(libc::EINVAL))?;
                // Another opening of what the descriptor stands for, as an eventfd_ctx is.
                let path = format!("/proc/self/fd/{fd}");
                assert!(std::fs::read_link(path)?.to_string_lossy().contains("eventfd"));
                let fd = descriptor(fd);
                if q.ready && q.kicked {
                    nix::unistd::write(&fd, &1u64.to_ne_bytes())?;
                    q.kicked = false;
                }
                q.kick = Some(fd);
            }
            (0x81, 0x17) => {
                let ok = d.status & DRIVER_OK != 0;
                let q = d.queues.get_mut(word(s, 0) as usize).filter(|_| ok).ok_or(error(libc::EINVAL))?;
                q.interrupts += 1;
            }
            (0x81, 0x18) => {
                let (uaddr, iova, size) = (long(s, 0), long(s, 8), long(s, 16));
                if iova != 0 || size != d.bounce || uaddr % 4096 != 0 {
                    return Err(error(libc::EINVAL));
                }
                if d.umem.is_some() {
                    return Err(error(libc::EEXIST));
                }
                d.umem = Some((uaddr, iova, size));
            }
            (0x81, 0x19) => d.umem = None,
            (0x81, 0x1a) if d.knows_no_info => return Err(error(libc::ENOTTY)),
            (0x81, 0x1a) => {
                let (first, last) = (long(s, 0), long(s, 8));
                let found = d.table.iter().find(|t| t.start <= last && t.last >= first);
                let (start, end) = found.map(|t| (t.start, t.last)).ok_or(error(libc::EINVAL))?;
                let is_bounce = start == 0 && end + 1 == d.bounce;
                for (i, v) in [start, end, is_bounce.into()].into_iter().enumerate() {
                    s[8 * i..8 * i + 8].copy_from_slice(&v.to_ne_bytes());
                }
            }
            (kind, nr) => panic!("ioctl {nr:#x} of kind {kind:#x}"),
        }
        Ok(())
    }

    fn ioctl_fd(&self, number: u64, s: &mut [u8]) -> io::Result<OwnedFd> {
        assert_eq!(number & 0xff, 0x10);
        let d = self.0.lock();
        let (first, last) = (long(s, 8), long(s, 16));
        let found = d.table.iter().filter(|t| t.start <= last && t.last >= first).min_by_key(|t| t.start);
        let t = found.ok_or(error(libc::EINVAL))?;
        let (offset, start, last, perm) = d.lie.unwrap_or((t.offset, t.start, t.last, t.perm));
        for (i, v) in [offset, start, last].into_iter().enumerate() {
            s[8 * i..8 * i + 8].copy_from_slice(&v.to_ne_bytes());
        }
        s[24] = perm;
        // The descriptor's mode follows the permission.
        let mut options = OpenOptions::new();
        options.read(t.perm & 1 != 0).write(t.perm & 2 != 0);
        Ok(options.open(format!("/proc/self/fd/{}", t.file.as_raw_fd()))?.into())
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut d = self.0.lock();
        let Some(request) = d.requests.pop_front() else {
            let _ = self.0.bell.read();
            return Err(io::ErrorKind::WouldBlock.into());
        };
        d.unanswered.push(request);
        into.copy_from_slice(request.as_bytes());
        Ok(if d.cuts_requests { 7 } else { into.len() })
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let response = DevResponse::read_from_bytes(bytes).map_err(|_| error(libc::EINVAL))?;
        if response.reserved != [0; 4] {
            return Err(error(libc::EINVAL));
        }
        let mut d = self.0.lock();
        let at = d.unanswered.iter().position(|r| r.id == response.id).ok_or(error(libc::ENOENT))?;
        d.unanswered.remove(at);
        d.answers.insert(response.id, response);
        Ok(bytes.len())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

/// A descriptor of our own by its number.
fn descriptor(fd: i32) -> OwnedFd {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    let us = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(us, fd, PidfdGetfdFlags::empty()).unwrap()
}
