//! The client in the guest: the `virtio-driver` crate, which shares no code with this workspace, on a vhost-vdpa node.
#![allow(unsafe_code)] // the crate takes memory that is shared with the device by raw address only

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kickless_tests::random::Random;
use poll_engine::memory::Ram;
use virtio_driver::{
    VhostVdpa, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags,
};

const QUEUES: usize = 2;
const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
const REQUESTS: usize = 600;
const SECONDS: u64 = 40;

/// Random writes and reads of the first blocks on both queues, each held against what was written last.
pub fn exercise(node: &str) {
    let wanted = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioFeatureFlags::RING_INDIRECT_DESC.bits()
        | VirtioBlkFeatureFlags::MQ.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits();
    let transport = VhostVdpa::<VirtioBlkConfig, VirtioBlkReqBuf>::with_path(node, wanted);
    let mut transport: Box<VirtioBlkTransport> = Box::new(transport.expect("the node"));
    let capacity = u64::from(transport.get_config().expect("configuration").capacity);
    assert!(capacity * 512 >= (BLOCKS * BLOCK) as u64, "{capacity} sectors");
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), QUEUES, 64).expect("queues");
    let ram = Ram::new(0, (BLOCKS * BLOCK) as u64, false).expect("memory");
    let host = ram.map().regions()[0].host_addr();
    transport.map_mem_region(host.addr(), BLOCKS * BLOCK, ram.fd().as_raw_fd(), 0).expect("map");
    let mut random = Random(1);
    let mut model = [0u8; BLOCKS];
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    for turn in 0..REQUESTS + BLOCKS {
        let (queue, at) = (turn % QUEUES, if turn < BLOCKS { turn } else { random.below(BLOCKS) });
        let block = ram.map().slice((at * BLOCK) as u64, BLOCK as u32).expect("block");
        let (offset, address) = ((at * BLOCK) as u64, host.wrapping_add(at * BLOCK));
        let is_write = turn < BLOCKS || random.below(2) == 0;
        let q = &mut queues[queue];
        if is_write {
            model[at] = turn as u8;
            block.fill(turn as u8);
            // SAFETY: a block of memory that lives until the end, and is used by one request at a time.
            unsafe { q.write_raw(offset, address, BLOCK, at) }.expect("write");
        } else {
            block.fill(0xee);
            // SAFETY: as above.
            unsafe { q.read_raw(offset, address, BLOCK, at) }.expect("read");
        }
        if q.avail_notif_needed() {
            transport.get_submission_notifier(queue).notify().expect("kick");
        }
        loop {
            if let Some(done) = q.completions().next() {
                assert_eq!((done.ret, done.context), (0, at), "request {turn}");
                break;
            }
            assert!(Instant::now() < deadline, "no answer to request {turn}");
            std::thread::sleep(Duration::from_micros(100));
        }
        let mut bytes = vec![0; BLOCK];
        block.read(&mut bytes);
        assert!(bytes.iter().all(|&b| b == model[at]), "request {turn}: block {at} is not {}", model[at]);
    }
    println!("{} requests", REQUESTS + BLOCKS);
}
