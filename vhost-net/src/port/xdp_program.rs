//! The XDP program of an uplink: what comes in on a queue that a socket is bound to goes to the socket, all else goes on
//! as ever. It is six instructions, so they are here as they are, and nothing has to be compiled or read from a file.
#![allow(unsafe_code)] // bpf(2)

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_long};
use nix::errno::Errno;

// include/uapi/linux/bpf.h
const MAP_CREATE: c_int = 0;
const MAP_UPDATE_ELEM: c_int = 2;
const PROG_LOAD: c_int = 5;
const LINK_CREATE: c_int = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const FUNC_REDIRECT_MAP: i32 = 51;
const XDP_PASS: i32 = 2;
// include/uapi/linux/if_link.h
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Driver,
    /// Behind it, in the kernel's stack.
    Generic,
}

/// A program on an interface, until it is dropped.
#[derive(Debug)]
pub struct Program {
    _link: OwnedFd,
    sockets: OwnedFd,
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// One instruction: operation, registers, offset, constant.
fn instruction(code: u8, [destination, source]: [u8; 2], offset: i16, constant: i32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [c0, c1, c2, c3] = constant.to_ne_bytes();
    // Fields of 4 bits are in the order that the machine's C has them.
    let registers =
        if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
    u64::from_ne_bytes([code, registers, o0, o1, c0, c1, c2, c3])
}

/// `bpf(2)`: what it returns.
///
/// # Safety
/// What `attributes` points to must be valid for what the command does with it.
unsafe fn bpf<T>(command: c_int, attributes: &T) -> Result<c_long, Errno> {
    let (at, len) = (std::ptr::from_ref(attributes), size_of::<T>());
    // SAFETY: `len` bytes of attributes, which the kernel reads; the rest is the caller's to see to.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, at, len) })
}

/// `bpf(2)` for a command that makes a descriptor.
///
/// # Safety
/// As of [`bpf`], and the command must be one of those.
unsafe fn bpf_fd<T>(command: c_int, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: handed on to the caller.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel has just made it for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

impl Program {
    /// Puts the program on an interface: into the driver if it can have one, else behind it.
    pub fn attach(index: u32) -> Result<(Program, Mode), Errno> {
        // As many queues as an interface may have that there is a socket for.
        let sockets = MapCreate {
            map_type: MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: 256,
            map_flags: 0,
        };
        // SAFETY: no pointers.
        let sockets = unsafe { bpf_fd(MAP_CREATE, &sockets) }?;
        let program = load(&sockets)?;
        let mut result = Err(Errno::EINVAL);
        for (mode, flags) in [(Mode::Driver, XDP_FLAGS_DRV_MODE), (Mode::Generic, XDP_FLAGS_SKB_MODE)] {
            let link = LinkCreate {
                program: program.as_raw_fd() as u32,
                ifindex: index,
                attach_type: ATTACH_XDP,
                flags,
            };
            // SAFETY: no pointers.
            result = unsafe { bpf_fd(LINK_CREATE, &link) }.map(|link| (link, mode));
            // With somebody else's program there, neither will do.
            if !matches!(result, Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ERANGE)) {
                break;
            }
        }
        result.map(|(link, mode)| (Program { _link: link, sockets }, mode))
    }

    /// Gives a socket what comes in on its queue.
    pub fn give(&self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        let value = socket.as_raw_fd() as u32;
        let update = MapUpdate {
            map: self.sockets.as_raw_fd() as u32,
            _pad: 0,
            key: (&raw const queue).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        // SAFETY: key and value are of 4 bytes, as the map was made for.
        unsafe { bpf(MAP_UPDATE_ELEM, &update) }.map(drop)
    }
}

fn load(sockets: &OwnedFd) -> Result<OwnedFd, Errno> {
    let program = [
        // r2 = xdp_md.rx_queue_index
        instruction(0x61, [2, 1], 16, 0),
        // r1 = the map, a constant of two instructions
        instruction(0x18, [1, 1], 0, sockets.as_raw_fd()),
        0,
        // r3 = XDP_PASS, for queues that are nobody's
        instruction(0xb7, [3, 0], 0, XDP_PASS),
        instruction(0x85, [0, 0], 0, FUNC_REDIRECT_MAP),
        // return r0
        instruction(0x95, [0, 0], 0, 0),
    ];
    let license = c"Apache-2.0";
    let load = ProgLoad {
        prog_type: PROG_TYPE_XDP,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        name: *b"kickless_uplink\0",
        ifindex: 0,
        expected_attach_type: ATTACH_XDP,
    };
    // SAFETY: the instructions and the licence live on, of the length given and ended by a zero.
    unsafe { bpf_fd(PROG_LOAD, &load) }
}
