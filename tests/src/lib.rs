//! Harness of the end-to-end tests: a Linux guest under QEMU whose disks are served by the `vhost-blk` daemon.
//!
//! | module      | what it is                                                                     |
//! |-------------|--------------------------------------------------------------------------------|
//! | [`scene`]   | a scratch directory per test, whose logs become the report when the test fails |
//! | [`process`] | child processes that are never left behind                                     |
//! | [`daemon`]  | the back end under test (or `qemu-storage-daemon` in its place)                |
//! | [`stats`]   | what the daemon prints on `SIGUSR1`                                            |
//! | [`qemu`]    | the virtual machine: boot, commands, hot-plug                                  |
//! | [`accel`]   | KVM or TCG, found out by measuring                                             |
//! | [`agent`]   | the command line inside the guest                                              |
//! | [`qmp`]     | QEMU's control socket                                                          |
//! | [`fio`]     | verified load inside the guest                                                 |
//! | [`linux`]   | Linux as one of the guests of [`scenario`]s, in QEMU and in a machine of ours  |
//! | [`net`]     | the network back end under test (or testpmd in its place)                      |
//! | [`netns`]   | a network namespace of a test's own                                            |
//! | [`testpmd`] | DPDK's testpmd, as an independent driver and as a second opinion                |
//! | [`echo`]    | a network card that is connected to itself                                     |
//! | [`image`]   | disk images as the host sees them                                              |
//! | [`qemu_img`] | images in formats of their own, by `qemu-img`                                 |
//!
//! Everything that waits has a deadline, and nothing outlives the test that started it.

pub mod accel;
pub mod agent;
pub mod bare;
pub mod cryptsetup;
pub mod daemon;
pub mod echo;
pub mod fio;
pub mod image;
pub mod linux;
pub mod loop_device;
pub mod net;
pub mod netns;
pub mod process;
pub mod qemu;
pub mod qemu_img;
pub mod qmp;
pub mod random;
pub mod runner;
pub mod scenario;
pub mod scene;
pub mod stats;
pub mod testpmd;
pub mod vmm;
pub mod wait;
