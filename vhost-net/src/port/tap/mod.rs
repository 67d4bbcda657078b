//! A tap of the host's: frames go between its queues and those of the guest through io_uring, straight from and to guest
//! memory, with the virtio header that both sides know, so that what the kernel and the guest leave undone (checksums,
//! segmentation) stays undone on the way (Linux, Documentation/networking/tuntap.rst).
//!
//! [`transmit`] is guest to tap, [`receive`] is tap to guest, [`card`] the network card that they belong to; [`uplink`]
//! joins a switch instead.

pub mod card;
mod comeback;
pub mod counters;
pub mod receive;
mod sys;
pub mod transmit;
pub mod uplink;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use poll_engine::confine::{self, Role};
use tracing::{info, warn};

use self::counters::{ReceiveDrop, TransmitDrop, Way};
use self::receive::Receive;
use self::transmit::Transmit;
use crate::features;
use crate::header::HEADER;
use crate::mib::Flow;
use crate::port::interface::{Interface, index_of, is_name};

/// Most queues of a tap (the kernel's `MAX_TAP_QUEUES`).
pub const MAX_PAIRS: u16 = 256;

/// Why a tap cannot be used: what, why, and the way out.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface has such a name.
    #[error("'{0}' is no name of an interface: 1 to 15 printable characters, without '/' and ':'")]
    Name(String),
    /// More queues than a tap has.
    #[error("a tap has 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(usize),
    /// There is no tun driver.
    #[error("no /dev/net/tun: load the driver (modprobe tun), or pass the device on into this container")]
    NoDriver,
    /// The device file is not for us.
    #[error("may not open /dev/net/tun: {0}; run as root, or let this user read and write it")]
    NoAccess(io::Error),
    /// Making or attaching to a tap needs a capability, or ownership.
    #[error(
        "may not use tap {0}: that needs CAP_NET_ADMIN, or a tap that is this user's \
         (ip tuntap add {0} mode tap vnet_hdr multi_queue user NAME)"
    )]
    NotPermitted(String),
    /// Somebody else has it, or all its queues.
    #[error("tap {0} is in use: another program has {1}; stop it, or take another tap")]
    Busy(String, &'static str),
    /// An interface of another kind.
    #[error("{0} is no tap: take another name, or remove it (ip link delete {0})")]
    NotTap(String),
    /// A tap with one queue.
    #[error(
        "tap {0} has a single queue pair, and {1} are wanted: make it anew with multi_queue \
         (ip tuntap add {0} mode tap vnet_hdr multi_queue), or ask for one"
    )]
    SingleQueue(String, u16),
    /// MTUs differ.
    #[error(
        "tap {name} has an MTU of {has}, and the device is to have {wanted}: change the tap's \
         (ip link set {name} mtu {wanted}), or leave the device's out to take the tap's over"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// What it has.
        has: u32,
        /// What was asked for.
        wanted: u16,
    },
    /// A descriptor that was passed is no tap's.
    #[error("descriptor {0} is not attached to a tap: {1}; whoever opens it attaches it (TUNSETIFF) as well")]
    NotAttached(usize, String),
    /// There is no such descriptor.
    #[error("descriptor {0} was not passed to this program")]
    NotPassed(i32),
    /// Descriptors that were passed belong to different taps.
    #[error("the descriptors are of different taps: {0} and {1}")]
    Different(String, String),
    /// The kernel refuses something else.
    #[error("tap {0}: {1}: {2}")]
    Io(String, &'static str, io::Error),
}

/// One queue of a tap.
#[derive(Debug)]
struct Pair {
    tun: OwnedFd,
    /// How many of the guest's two queues run on it; and whether the kernel uses it.
    running: Mutex<u8>,
    receive: Way<ReceiveDrop>,
    transmit: Way<TransmitDrop>,
}

/// A tap, open. It goes away with this if it did not exist before.
pub struct Tap {
    name: String,
    pairs: Vec<Pair>,
    interface: Interface,
    mtu: u32,
    has_uso: bool,
    /// What the driver has agreed on last, and whether its end of the link is up.
    features: AtomicU64,
    carrier: AtomicBool,
    gone: AtomicBool,
    on_change: OnceLock<Box<dyn Fn() + Send + Sync>>,
    own: Weak<Tap>,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tap")
            .field("name", &self.name)
            .field("pairs", &self.pairs.len())
            .finish_non_exhaustive()
    }
}

impl Tap {
    /// Attaches to the tap `name`, which is made, and set up, if there is none. With an `mtu`, one that is made gets it,
    /// and one that is there must have it.
    pub fn open(name: &str, pairs: u16, mtu: Option<u16>) -> Result<Arc<Tap>, TapError> {
        if !is_name(name) {
            return Err(TapError::Name(name.into()));
        }
        check_pairs(pairs.into())?;
        // One that is on its way out may be gone before it is attached to, which then makes another one.
        let before = index_of(name);
        let tun = open_tun()?;
        let (name, is_multi_queue) = attach_first(tun.as_fd(), name, pairs)?;
        let is_new = before.is_none() || before != index_of(&name);
        let mut tuns = vec![tun];
        for _ in 1..pairs {
            let tun = open_tun()?;
            sys::attach(tun.as_fd(), &name, flags(is_multi_queue)).map_err(|e| match e.raw_os_error() {
                Some(libc::E2BIG | libc::EBUSY) => TapError::Busy(name.clone(), "the other queues"),
                _ => TapError::Io(name.clone(), "attaching a further queue", e),
            })?;
            tuns.push(tun);
        }
        Tap::set_up(name, tuns, mtu, is_new)
    }

    /// A tap that somebody else has opened and attached (QEMU's `fd=`, `fds=`): one descriptor for each pair of queues.
    pub fn inherit(tuns: Vec<OwnedFd>, mtu: Option<u16>) -> Result<Arc<Tap>, TapError> {
        check_pairs(tuns.len())?;
        let mut name: Option<String> = None;
        for (at, tun) in tuns.iter().enumerate() {
            let no = |why: &str| TapError::NotAttached(at, why.into());
            let (found, flags) = sys::attached(tun.as_fd()).map_err(|e| no(&e.to_string()))?;
            // IFF_NO_PI cannot be asked for: the kernel has the same bit for something else here.
            let lacking = [
                (flags & libc::IFF_TAP != 0, "it is a tun, which has no Ethernet frames"),
                (flags & libc::IFF_VNET_HDR != 0, "it was attached without IFF_VNET_HDR"),
                (
                    tuns.len() == 1 || flags & libc::IFF_MULTI_QUEUE != 0,
                    "it was attached without IFF_MULTI_QUEUE",
                ),
            ];
            if let Some((_, why)) = lacking.iter().find(|(has, _)| !has) {
                return Err(no(why));
            }
            match &name {
                Some(name) if *name != found => return Err(TapError::Different(name.clone(), found)),
                _ => name = Some(found),
            }
        }
        Tap::set_up(name.unwrap_or_default(), tuns, mtu, false)
    }

    /// As [`inherit`](Self::inherit), by the numbers that the descriptors have in this process, which nobody else uses.
    pub fn inherit_numbers(numbers: &[i32], mtu: Option<u16>) -> Result<Arc<Tap>, TapError> {
        let own = |&number: &i32| sys::passed(number).ok_or(TapError::NotPassed(number));
        Tap::inherit(numbers.iter().map(own).collect::<Result<_, _>>()?, mtu)
    }

    fn set_up(
        name: String,
        tuns: Vec<OwnedFd>,
        mtu: Option<u16>,
        is_new: bool,
    ) -> Result<Arc<Tap>, TapError> {
        let fail = |what| {
            let name = name.clone();
            move |e| TapError::Io(name, what, e)
        };
        let tun = tuns[0].as_fd();
        sys::set_header(tun, HEADER).map_err(fail("setting the size of headers"))?;
        let interface = Interface::new(&name).map_err(fail("a socket"))?;
        if let (true, Some(mtu)) = (is_new, mtu) {
            interface.set_mtu(mtu.into()).map_err(fail("setting the MTU"))?;
        }
        let has = interface.mtu().map_err(fail("its MTU"))?;
        if let Some(wanted) = mtu.filter(|&wanted| u32::from(wanted) != has) {
            return Err(TapError::Mtu { name, has, wanted });
        }
        // Linux 6.2 and later.
        let has_uso = sys::set_offload(tun, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        sys::set_offload(tun, 0).map_err(fail("setting offloads"))?;
        if is_new {
            interface.set_up().map_err(fail("setting it up"))?;
        } else if !interface.is_up().map_err(fail("its state"))? {
            warn!("tap {name} is down, so nothing passes yet: ip link set {name} up");
        }
        // A queue that nobody reads swallows what the kernel chooses it for.
        if tuns.len() > 1 {
            for tun in &tuns {
                sys::use_queue(tun.as_fd(), false).map_err(fail("taking a queue out of use"))?;
            }
        }
        info!("tap {name}: {}, {} queue pairs, MTU {has}", if is_new { "made" } else { "found" }, tuns.len());
        let pair =
            |tun| Pair { tun, running: Mutex::new(0), receive: Way::default(), transmit: Way::default() };
        Ok(Arc::new_cyclic(|own| Tap {
            name,
            pairs: tuns.into_iter().map(pair).collect(),
            interface,
            mtu: has,
            has_uso,
            features: AtomicU64::new(0),
            carrier: AtomicBool::new(true),
            gone: AtomicBool::new(false),
            on_change: OnceLock::new(),
            own: Weak::clone(own),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many pairs of queues it has.
    pub fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// Its MTU when it was opened, in bytes.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Features of a device that the tap makes possible.
    pub fn features(&self) -> u64 {
        use features::{
            CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN, HOST_TSO4,
            HOST_TSO6, HOST_USO,
        };
        let always = CSUM
            | GUEST_CSUM
            | GUEST_TSO4
            | GUEST_TSO6
            | GUEST_ECN
            | HOST_TSO4
            | HOST_TSO6
            | HOST_ECN
            | features::MRG_RXBUF;
        always | if self.has_uso { HOST_USO | GUEST_USO4 | GUEST_USO6 } else { 0 }
    }

    /// Has the kernel leave undone what a driver of these features takes undone. For the device's whole life until the
    /// next call: it holds for all queues of a tap.
    pub fn negotiated(&self, features: u64) -> io::Result<()> {
        self.features.store(features, Ordering::Relaxed);
        self.unless_gone(sys::set_offload(self.tun().as_fd(), offload(features)))
    }

    /// A queue of a tap that has been deleted runs as well: into nothing.
    fn unless_gone(&self, done: io::Result<()>) -> io::Result<()> {
        match done {
            // The latter is what a queue says that was out of use.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EBADFD | libc::EINVAL))
                    && self.interface.index().is_none() =>
            {
                self.has_gone();
                Ok(())
            }
            done => done,
        }
    }

    /// The handler of the guest's receive queue of this pair. The driver has these features.
    pub fn receive(self: &Arc<Tap>, pair: u16, features: u64, ring_size: u16) -> io::Result<Receive> {
        Ok(Receive::new(self.run(pair)?, features, ring_size))
    }

    /// The handler of the guest's transmit queue of this pair. The driver has these features.
    pub fn transmit(self: &Arc<Tap>, pair: u16, features: u64, ring_size: u16) -> io::Result<Transmit> {
        Ok(Transmit::new(self.run(pair)?, features, ring_size))
    }

    /// The only descriptor of a tap with one queue, the first of others.
    fn tun(&self) -> &OwnedFd {
        &self.pairs[0].tun
    }

    /// Why the kernel does not take a frame.
    fn why_not_sent(&self, errno: i32) -> TransmitDrop {
        match errno {
            libc::EIO => TransmitDrop::Down,
            libc::EBADFD => {
                self.has_gone();
                TransmitDrop::Gone
            }
            libc::EAGAIN => TransmitDrop::Full,
            _ => TransmitDrop::Refused,
        }
    }

    /// Says whether the guest's end of the link is up.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        self.carrier.store(up, Ordering::Relaxed);
        self.unless_gone(sys::set_carrier(self.tun().as_fd(), up))
    }

    /// Has a frame come out of the tap, as if the guest had sent it; a tap that takes none now loses it.
    pub fn inject(&self, frame: &[u8]) {
        let written = nix::unistd::write(self.tun(), &[&[0; HEADER], frame].concat());
        if let Err(e) = written {
            warn!("tap {}: a frame for a guest is lost: {e}", self.name);
        }
    }

    /// Whether the interface has been deleted, and not made anew.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// To be called when the interface is deleted, on a reactor, so it must not wait; and when it is there again. The first
    /// one given counts.
    pub fn on_change(&self, act: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(act));
    }

    /// All counters, by name, as `ethtool -S` has them; receiving and transmitting are the guest's.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let mut all = Vec::new();
        for (at, pair) in self.pairs.iter().enumerate() {
            pair.receive.list(&format!("rx_queue_{at}_"), &mut all);
            pair.transmit.list(&format!("tx_queue_{at}_"), &mut all);
        }
        all
    }

    /// What its card counts as an interface does: to the guest, and from it.
    pub fn flows(&self) -> [Flow; 2] {
        let all = || (0..self.pairs.len()).filter_map(|at| self.flows_of(at));
        [all().map(|[rx, _]| rx).sum(), all().map(|[_, tx]| tx).sum()]
    }

    /// The same of one pair of queues, if there is that.
    pub fn flows_of(&self, pair: usize) -> Option<[Flow; 2]> {
        let is_bad = |why| {
            matches!(
                why,
                TransmitDrop::Short | TransmitDrop::TooLong | TransmitDrop::Header | TransmitDrop::Refused
            )
        };
        let pair = self.pairs.get(pair)?;
        Some([pair.receive.flow(|why| why == ReceiveDrop::Failed), pair.transmit.flow(is_bad)])
    }

    fn run(self: &Arc<Tap>, pair: u16) -> io::Result<Running> {
        let none = || io::Error::other(format!("tap {} has no queue pair {pair}", self.name));
        let of = self.pairs.get(usize::from(pair)).ok_or_else(none)?;
        let mut running = of.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running == 0 && self.pairs.len() > 1 {
            self.unless_gone(sys::use_queue(of.tun.as_fd(), true))?;
        }
        *running += 1;
        Ok(Running { tap: Arc::clone(self), pair: pair.into() })
    }

    fn stopped(&self, pair: usize) {
        let of = &self.pairs[pair];
        let mut running = of.running.lock().unwrap_or_else(PoisonError::into_inner);
        *running -= 1;
        if *running == 0
            && !self.is_gone()
            && let Err(e) = sys::use_queue(of.tun.as_fd(), false)
        {
            warn!("tap {}: queue {pair} stays in use: {e}", self.name);
        }
    }

    #[cold]
    fn has_gone(&self) {
        if self.gone.swap(true, Ordering::Relaxed) {
            return;
        }
        let (name, queues) = (&self.name, if self.pairs.len() > 1 { " multi_queue" } else { "" });
        warn!(
            "tap {name} has been deleted: the link is down until it is made anew \
             (ip tuntap add {name} mode tap vnet_hdr{queues}; ip link set {name} up)"
        );
        self.tell();
        if let Err(e) = comeback::wait(Weak::clone(&self.own)) {
            warn!("tap {name}: nobody waits for it ({e}): restart this program when it is there again");
        }
    }

    fn tell(&self) {
        if let Some(act) = self.on_change.get() {
            act();
        }
    }
}

/// A queue of a tap that the guest uses.
#[derive(Debug)]
struct Running {
    tap: Arc<Tap>,
    pair: usize,
}

impl Running {
    fn pair(&self) -> &Pair {
        &self.tap.pairs[self.pair]
    }

    fn tun(&self) -> BorrowedFd<'_> {
        self.pair().tun.as_fd()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.tap.pairs.len() == 1 {
            *self.pair().running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            return;
        }
        // Taking a queue out of use waits for whoever changes interfaces just now, which no reactor may.
        let (tap, pair) = (Arc::clone(&self.tap), self.pair);
        let begun = confine::post("tap-queue", Role::Opener, move || tap.stopped(pair));
        if let Err(e) = begun {
            warn!("tap {}: queue {pair} stays in use: {e}", self.tap.name);
        }
    }
}

fn check_pairs(pairs: usize) -> Result<(), TapError> {
    let is_good = (1..=usize::from(MAX_PAIRS)).contains(&pairs);
    if is_good { Ok(()) } else { Err(TapError::Pairs(pairs)) }
}

fn open_tun() -> Result<OwnedFd, TapError> {
    sys::open_tun().map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver,
        _ => TapError::NoAccess(e),
    })
}

fn flags(is_multi_queue: bool) -> i32 {
    libc::IFF_TAP
        | libc::IFF_NO_PI
        | libc::IFF_VNET_HDR
        | if is_multi_queue { libc::IFF_MULTI_QUEUE } else { 0 }
}

/// Attaches the first queue. A tap that is there decides itself whether it has several; that must be said right.
fn attach_first(tun: BorrowedFd<'_>, name: &str, pairs: u16) -> Result<(String, bool), TapError> {
    let wanted = pairs > 1;
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(libc::EPERM) => TapError::NotPermitted(name.into()),
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name.into(), "its queue"),
        Some(libc::EINVAL) => TapError::NotTap(name.into()),
        _ => TapError::Io(name.into(), "attaching", e),
    };
    match sys::attach(tun, name, flags(wanted)) {
        Ok(name) => Ok((name, wanted)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            let name = sys::attach(tun, name, flags(!wanted)).map_err(failed)?;
            if wanted { Err(TapError::SingleQueue(name, pairs)) } else { Ok((name, true)) }
        }
        Err(e) => Err(failed(e)),
    }
}

/// `TUN_F_*` for what a driver takes.
fn offload(has: u64) -> u32 {
    let has = |bits: u64| has & bits == bits;
    // 5.1.3.1: all others require it.
    if !has(features::GUEST_CSUM) {
        return 0;
    }
    let segments = has(features::GUEST_TSO4) || has(features::GUEST_TSO6);
    let uso = features::GUEST_USO4 | features::GUEST_USO6;
    [
        (true, libc::TUN_F_CSUM),
        (has(features::GUEST_TSO4), libc::TUN_F_TSO4),
        (has(features::GUEST_TSO6), libc::TUN_F_TSO6),
        (segments && has(features::GUEST_ECN), libc::TUN_F_TSO_ECN),
        // The kernel has both or none.
        (has(uso), libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ]
    .iter()
    .fold(0, |all, &(on, bit)| if on { all | bit } else { all })
}

#[cfg(test)]
mod tests {
    use super::*;
    use features::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6};

    #[test]
    fn the_kernel_leaves_undone_what_the_driver_takes_undone() {
        let all = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
        assert_eq!(offload(all), 0x6f);
        assert_eq!(offload(0), 0);
        assert_eq!(offload(GUEST_TSO4 | GUEST_TSO6), 0);
        assert_eq!(offload(GUEST_CSUM | GUEST_ECN | GUEST_USO4), libc::TUN_F_CSUM);
        assert_eq!(offload(GUEST_CSUM | GUEST_TSO6), libc::TUN_F_CSUM | libc::TUN_F_TSO6);
    }

    #[test]
    fn names_that_no_interface_has_are_refused() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-letters-", "ü"] {
            assert!(matches!(Tap::open(bad, 1, None), Err(TapError::Name(_))), "{bad}");
        }
        assert!(matches!(Tap::open("kl0", 0, None), Err(TapError::Pairs(0))));
        assert!(matches!(Tap::open("kl0", 257, None), Err(TapError::Pairs(257))));
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Tap::inherit(vec![file.into()], None).unwrap_err();
        assert!(error.to_string().starts_with("descriptor 0 is not attached to a tap: "), "{error}");
    }
}
