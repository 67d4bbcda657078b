//! Feature bits of a network device (virtio 1.3, 5.1.3), as masks. Those of every device are the engine's.
//!
//! `GUEST_*` is what the driver takes from the device, `HOST_*` what the device takes from the driver.

/// `VIRTIO_NET_F_CSUM`: the device completes checksums.
pub const CSUM: u64 = 1;
/// `VIRTIO_NET_F_GUEST_CSUM`: the driver takes packets whose checksum is partial.
pub const GUEST_CSUM: u64 = 1 << 1;
/// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`: offloads of receive can be changed through the control queue.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// `VIRTIO_NET_F_MTU`: the device says how large packets are at most.
pub const MTU: u64 = 1 << 3;
/// `VIRTIO_NET_F_MAC`: the device has a MAC address.
pub const MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_GUEST_TSO4`.
pub const GUEST_TSO4: u64 = 1 << 7;
/// `VIRTIO_NET_F_GUEST_TSO6`.
pub const GUEST_TSO6: u64 = 1 << 8;
/// `VIRTIO_NET_F_GUEST_ECN`: those may have the ECN bit.
pub const GUEST_ECN: u64 = 1 << 9;
/// `VIRTIO_NET_F_GUEST_UFO`: UDP to be fragmented. Not ours.
pub const GUEST_UFO: u64 = 1 << 10;
/// `VIRTIO_NET_F_HOST_TSO4`.
pub const HOST_TSO4: u64 = 1 << 11;
/// `VIRTIO_NET_F_HOST_TSO6`.
pub const HOST_TSO6: u64 = 1 << 12;
/// `VIRTIO_NET_F_HOST_ECN`: those may have the ECN bit.
pub const HOST_ECN: u64 = 1 << 13;
/// `VIRTIO_NET_F_HOST_UFO`: UDP to be fragmented. Not ours.
pub const HOST_UFO: u64 = 1 << 14;
/// `VIRTIO_NET_F_MRG_RXBUF`: a packet may be spread over receive buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// `VIRTIO_NET_F_STATUS`: the device says whether the link is up.
pub const STATUS: u64 = 1 << 16;
/// `VIRTIO_NET_F_CTRL_VQ`: there is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// `VIRTIO_NET_F_CTRL_RX`: what is received can be filtered.
pub const CTRL_RX: u64 = 1 << 18;
/// `VIRTIO_NET_F_CTRL_VLAN`: VLANs can be filtered.
pub const CTRL_VLAN: u64 = 1 << 19;
/// `VIRTIO_NET_F_CTRL_RX_EXTRA`: more filters.
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
/// `VIRTIO_NET_F_GUEST_ANNOUNCE`: the driver announces itself when it is told to.
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
/// `VIRTIO_NET_F_MQ`: several pairs of queues.
pub const MQ: u64 = 1 << 22;
/// `VIRTIO_NET_F_CTRL_MAC_ADDR`: the MAC address can be set through the control queue.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;
/// `VIRTIO_NET_F_GUEST_USO4`: UDP over IPv4 to be segmented.
pub const GUEST_USO4: u64 = 1 << 54;
/// `VIRTIO_NET_F_GUEST_USO6`: UDP over IPv6 to be segmented.
pub const GUEST_USO6: u64 = 1 << 55;
/// `VIRTIO_NET_F_HOST_USO`: UDP to be segmented, over either.
pub const HOST_USO: u64 = 1 << 56;
/// `VIRTIO_NET_F_HASH_REPORT`: each packet comes with its hash.
pub const HASH_REPORT: u64 = 1 << 57;
/// `VIRTIO_NET_F_GUEST_HDRLEN`: `hdr_len` is exact.
pub const GUEST_HDRLEN: u64 = 1 << 59;
/// `VIRTIO_NET_F_RSS`: receive queues are chosen by hash.
pub const RSS: u64 = 1 << 60;
/// `VIRTIO_NET_F_STANDBY`: the device stands by for another of the same MAC address.
pub const STANDBY: u64 = 1 << 62;
/// `VIRTIO_NET_F_SPEED_DUPLEX`: the device says how fast it is.
pub const SPEED_DUPLEX: u64 = 1 << 63;
