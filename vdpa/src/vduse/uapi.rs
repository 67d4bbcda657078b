//! `linux/vduse.h` as types: what goes to the kernel and comes from it, byte for byte, and the numbers of the calls.
//!
//! Only API version 0 is spoken: one group of queues, one address space. The version is set explicitly, for a kernel
//! that knows a later one may take that for granted, and then wants groups.

#![allow(missing_docs)] // fields are the header's

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The version that is spoken.
pub const API_VERSION: u64 = 0;
/// Bytes of a name with its NUL.
pub const NAME_MAX: usize = 256;

const fn number(direction: u64, nr: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0x81 << 8 | nr
}
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// `VDUSE_GET_API_VERSION`.
pub const GET_API_VERSION: u64 = number(READ, 0x00, 8);
/// `VDUSE_SET_API_VERSION`.
pub const SET_API_VERSION: u64 = number(WRITE, 0x01, 8);
/// `VDUSE_CREATE_DEV`; the configuration space follows.
pub const CREATE_DEV: u64 = number(WRITE, 0x02, size_of::<DevConfig>());
/// `VDUSE_DESTROY_DEV`.
pub const DESTROY_DEV: u64 = number(WRITE, 0x03, NAME_MAX);
/// `VDUSE_IOTLB_GET_FD`: returns a descriptor.
pub const IOTLB_GET_FD: u64 = number(READ | WRITE, 0x10, size_of::<IotlbEntry>());
/// `VDUSE_DEV_GET_FEATURES`.
pub const DEV_GET_FEATURES: u64 = number(READ, 0x11, 8);
/// `VDUSE_DEV_SET_CONFIG`; the bytes follow.
pub const DEV_SET_CONFIG: u64 = number(WRITE, 0x12, size_of::<ConfigData>());
/// `VDUSE_DEV_INJECT_CONFIG_IRQ`.
pub const DEV_INJECT_CONFIG_IRQ: u64 = number(NONE, 0x13, 0);
/// `VDUSE_VQ_SETUP`.
pub const VQ_SETUP: u64 = number(WRITE, 0x14, size_of::<VqConfig>());
/// `VDUSE_VQ_GET_INFO`.
pub const VQ_GET_INFO: u64 = number(READ | WRITE, 0x15, size_of::<VqInfo>());
/// `VDUSE_VQ_SETUP_KICKFD`.
pub const VQ_SETUP_KICKFD: u64 = number(WRITE, 0x16, size_of::<VqEventfd>());
/// `VDUSE_VQ_INJECT_IRQ`.
pub const VQ_INJECT_IRQ: u64 = number(WRITE, 0x17, 4);
/// `VDUSE_IOTLB_REG_UMEM` (Linux 6.0).
pub const IOTLB_REG_UMEM: u64 = number(WRITE, 0x18, size_of::<IovaUmem>());
/// `VDUSE_IOTLB_DEREG_UMEM`.
pub const IOTLB_DEREG_UMEM: u64 = number(WRITE, 0x19, size_of::<IovaUmem>());
/// `VDUSE_IOTLB_GET_INFO`.
pub const IOTLB_GET_INFO: u64 = number(READ | WRITE, 0x1a, size_of::<IovaInfo>());

/// `struct vduse_dev_config` without the configuration space.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevConfig {
    pub name: [u8; NAME_MAX],
    pub vendor_id: u32,
    pub device_id: u32,
    pub features: u64,
    pub vq_num: u32,
    pub vq_align: u32,
    /// Groups, address spaces (version 1), reserved.
    pub reserved: [u32; 13],
    pub config_size: u32,
}

/// `struct vduse_iotlb_entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IotlbEntry {
    /// Where the region begins in the file.
    pub offset: u64,
    pub start: u64,
    /// The last address, which is inside.
    pub last: u64,
    /// `VDUSE_ACCESS_RO`, `_WO`, `_RW`: 1, 2, 3.
    pub perm: u8,
    pub padding: [u8; 7],
}

/// `struct vduse_config_data` without the bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigData {
    pub offset: u32,
    pub length: u32,
}

/// `struct vduse_vq_config`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VqConfig {
    pub index: u32,
    pub max_size: u16,
    /// With the group of version 1.
    pub reserved: [u16; 13],
}

/// `struct vduse_vq_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VqInfo {
    pub index: u32,
    pub num: u32,
    pub desc_addr: u64,
    pub driver_addr: u64,
    pub device_addr: u64,
    /// Split: the available index. Packed: available wrap counter and index, used wrap counter and index.
    pub state: [u16; 4],
    pub ready: u8,
    pub padding: [u8; 7],
}

/// `struct vduse_vq_eventfd`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VqEventfd {
    pub index: u32,
    /// -1 takes it away.
    pub fd: i32,
}

/// `struct vduse_iova_umem`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IovaUmem {
    pub uaddr: u64,
    pub iova: u64,
    pub size: u64,
    pub reserved: [u64; 3],
}

/// `struct vduse_iova_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IovaInfo {
    pub start: u64,
    pub last: u64,
    /// [`IOVA_CAP_UMEM`].
    pub capability: u64,
    pub reserved: [u64; 3],
}

/// `VDUSE_IOVA_CAP_UMEM`: memory of ours may be put there.
pub const IOVA_CAP_UMEM: u64 = 1;

/// `struct vduse_dev_request`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevRequest {
    pub kind: u32,
    pub id: u32,
    pub reserved: [u32; 4],
    pub payload: [u32; 32],
}

/// `struct vduse_dev_response`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevResponse {
    pub id: u32,
    /// 0 is done, 1 is failed.
    pub result: u32,
    pub reserved: [u32; 4],
    pub payload: [u32; 32],
}

const _: () = {
    // As a C compiler has them on x86-64.
    assert!(size_of::<DevConfig>() == 336 && size_of::<IotlbEntry>() == 32 && size_of::<VqConfig>() == 32);
    assert!(size_of::<VqInfo>() == 48 && size_of::<IovaUmem>() == 48 && size_of::<IovaInfo>() == 48);
    assert!(size_of::<DevRequest>() == 152 && size_of::<DevResponse>() == 152);
};

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `VDUSE_GET_VQ_STATE`: where a queue stands.
    VqState(u32),
    /// `VDUSE_SET_STATUS`: the driver sets the device status; 0 is a reset.
    SetStatus(u8),
    /// `VDUSE_UPDATE_IOTLB`: translations of these addresses, first and last, have changed.
    UpdateIotlb(u64, u64),
    /// Something of a later version.
    Unknown(u32),
}

impl DevRequest {
    /// What it asks.
    pub fn request(&self) -> Request {
        let p = &self.payload;
        let long = |i: usize| u64::from(p[i]) | u64::from(p[i + 1]) << 32;
        match self.kind {
            0 => Request::VqState(p[0]),
            1 => Request::SetStatus(p[0] as u8),
            2 => Request::UpdateIotlb(long(0), long(2)),
            other => Request::Unknown(other),
        }
    }
}

/// Where a queue stands, as [`RingConfig::base`](poll_engine::ring::RingConfig::base) and as the kernel has it.
pub mod vq_state {
    use poll_engine::ring::RingFormat;

    /// The base.
    pub fn to_base(state: [u16; 4], format: RingFormat) -> u32 {
        match format {
            RingFormat::Split => state[0].into(),
            RingFormat::Packed => {
                let half =
                    |counter: u16, index: u16| u32::from(index & 0x7fff) | u32::from(counter & 1) << 15;
                half(state[0], state[1]) | half(state[2], state[3]) << 16
            }
        }
    }

    /// The kernel's form of a base.
    pub fn of_base(base: u32, format: RingFormat) -> [u16; 4] {
        match format {
            RingFormat::Split => [base as u16, 0, 0, 0],
            RingFormat::Packed => {
                let half = |h: u32| [(h >> 15 & 1) as u16, (h & 0x7fff) as u16];
                let ([a, b], [c, d]) = (half(base), half(base >> 16));
                [a, b, c, d]
            }
        }
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// Not done; the kernel makes an error of it.
    Failed,
    /// Where the queue stands.
    VqState(u32, [u16; 4]),
}

impl Answer {
    /// As it is written.
    pub fn response(self, id: u32) -> DevResponse {
        let mut response =
            DevResponse { id, result: u32::from(self == Answer::Failed), reserved: [0; 4], payload: [0; 32] };
        if let Answer::VqState(index, s) = self {
            let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
            response.payload[..3].copy_from_slice(&[index, pair(s[0], s[1]), pair(s[2], s[3])]);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use poll_engine::ring::RingFormat;

    #[test]
    fn numbers_are_those_of_the_header() {
        // Printed by a C program that includes linux/vduse.h.
        assert_eq!(CREATE_DEV, 0x4150_8102);
        assert_eq!(DESTROY_DEV, 0x4100_8103);
        assert_eq!(IOTLB_GET_FD, 0xc020_8110);
        assert_eq!(DEV_SET_CONFIG, 0x4008_8112);
        assert_eq!(DEV_INJECT_CONFIG_IRQ, 0x8113);
        assert_eq!(VQ_SETUP, 0x4020_8114);
        assert_eq!(VQ_GET_INFO, 0xc030_8115);
        assert_eq!(VQ_SETUP_KICKFD, 0x4008_8116);
        assert_eq!(VQ_INJECT_IRQ, 0x4004_8117);
        assert_eq!(IOTLB_REG_UMEM, 0x4030_8118);
        assert_eq!(IOTLB_GET_INFO, 0xc030_811a);
    }

    #[test]
    fn states_of_queues_go_there_and_back() {
        assert_eq!(vq_state::to_base([7, 9, 9, 9], RingFormat::Split), 7);
        let packed = [1, 0x123, 0, 0x7ff];
        let base = vq_state::to_base(packed, RingFormat::Packed);
        assert_eq!(base, 0x8123 | 0x07ff << 16);
        assert_eq!(vq_state::of_base(base, RingFormat::Packed), packed);
        assert_eq!(vq_state::of_base(0xffff, RingFormat::Split), [0xffff, 0, 0, 0]);
        // Bits that mean nothing are let go.
        assert_eq!(vq_state::to_base([0xfffe, 0x8001, 3, 2], RingFormat::Packed), 1 | 0x8002 << 16);
    }

    #[test]
    fn requests_and_answers_are_laid_out_as_the_kernel_has_them() {
        let mut request = DevRequest { kind: 2, id: 5, reserved: [0; 4], payload: [0; 32] };
        request.payload[..4].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(request.request(), Request::UpdateIotlb(1 | 2 << 32, 3 | 4 << 32));
        assert_eq!(DevRequest { kind: 1, ..request }.request(), Request::SetStatus(1));
        assert_eq!(DevRequest { kind: 0, ..request }.request(), Request::VqState(1));
        assert_eq!(DevRequest { kind: 3, ..request }.request(), Request::Unknown(3));
        let answer = Answer::VqState(6, [1, 2, 3, 4]).response(5);
        assert_eq!(&answer.as_bytes()[..8], &[5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&answer.as_bytes()[24..36], &[6, 0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0]);
        assert_eq!(Answer::Failed.response(5).result, 1);
        assert!(answer.reserved.iter().all(|&r| r == 0), "the kernel refuses anything else");
    }
}
