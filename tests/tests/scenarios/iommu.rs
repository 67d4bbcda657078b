//! Disks behind an IOMMU of the guest's: QEMU's `intel-iommu` with device IOTLB.

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Daemon, Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;

use super::{FIO_LIMIT, expect_output};

/// A guest with a disk behind its IOMMU.
struct Behind {
    image: Image,
    daemon: Daemon,
    vm: Vm,
}

impl Behind {
    /// `domain` is what the guest's kernel calls what `args` asks for; `props` are of the disk.
    fn new(
        scene: &Scene,
        args: &str,
        domain: &str,
        props: impl Fn(Disk) -> Disk,
        poll: &'static str,
    ) -> Result<Self> {
        let image = Image::create(scene, "disk.img", 64 * MIB)?;
        let daemon = Options::default().poll(poll).queue_size(1024).spawn(scene, "daemon", &image)?;
        let disk = props(Disk::new("disk", daemon.socket()).behind_iommu());
        let mut vm = Vm::builder().iommu().kernel_arg(args).disk(disk).boot(scene)?;
        expect_output(&mut vm, "cut -c34 /sys/block/vda/device/features", "1")?;
        let group = "cat $(readlink -f /sys/block/vda/device/..)/iommu_group/type";
        expect_output(&mut vm, group, domain)?;
        Ok(Behind { image, daemon, vm })
    }

    /// Small, large and odd requests, verified.
    fn load(&mut self, jobs: u32) -> Result<()> {
        let blocks = "bssplit=512/20:4k/40:13312/20:66048/20 --bs_unaligned=1";
        let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg(blocks).jobs(jobs, 2);
        fio.run(&mut self.vm, FIO_LIMIT).map(drop)
    }

    /// Translations that were waited for, after so many requests at least.
    fn misses(&mut self) -> Result<u64> {
        let stats = self.daemon.stats()?;
        println!("{}", stats.text());
        ensure!(stats.errors() == 0, "errors:\n{}", stats.text());
        Ok(stats.iotlb_misses())
    }

    fn finish(self) -> Result<Option<String>> {
        self.vm.quit()?;
        self.daemon.terminate()?;
        Ok(None)
    }
}

fn skipped() -> Option<String> {
    (Kind::from_env() == Kind::Qsd).then(|| "a feature of vhost-blk".to_owned())
}

/// Every buffer is mapped for its request, and unmapped and invalidated when it is over. The rings have several pages,
/// which Linux takes from anywhere.
pub fn strict(scene: &Scene) -> Result<Option<String>> {
    if let Some(reason) = skipped() {
        return Ok(Some(reason));
    }
    let wide = |disk: Disk| disk.prop("queue-size", 1024).prop("num-queues", 2);
    let mut behind = Behind::new(scene, "intel_iommu=on iommu.strict=1", "DMA", wide, "adaptive")?;
    behind.load(2)?;
    let misses = behind.misses()?;
    ensure!(misses > 100, "{misses} misses where every request has new addresses");
    // Another back end has to ask for everything again.
    let Behind { image, daemon, mut vm } = behind;
    vm.tolerate("ring restore failed");
    let load = Fio::new("restart", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(2, 1);
    load.start_loop(&mut vm)?;
    load.wait_busy(&mut vm, "vda")?;
    daemon.terminate()?;
    let daemon = Options::default().queue_size(1024).spawn(scene, "daemon", &image)?;
    load.wait_busy(&mut vm, "vda")?;
    load.finish(&mut vm, FIO_LIMIT)?;
    let mut behind = Behind { image, daemon, vm };
    behind.misses()?;
    behind.finish()
}

/// Every buffer is mapped for its request, and the invalidation of many is left for later and done at once: until then the
/// daemon may keep what it knows, and Linux does not use those addresses again.
pub fn lazy(scene: &Scene) -> Result<Option<String>> {
    if let Some(reason) = skipped() {
        return Ok(Some(reason));
    }
    let two = |disk: Disk| disk.prop("num-queues", 2);
    let mut behind = Behind::new(scene, "intel_iommu=on iommu.strict=0", "DMA-FQ", two, "event")?;
    behind.load(2)?;
    let misses = behind.misses()?;
    ensure!(misses > 100, "{misses} misses where every request has new addresses");
    behind.finish()
}

/// Addresses are physical ones, and still told page by page; each page once.
pub fn passthrough(scene: &Scene) -> Result<Option<String>> {
    if let Some(reason) = skipped() {
        return Ok(Some(reason));
    }
    let mut behind = Behind::new(scene, "intel_iommu=on iommu=pt", "identity", |disk| disk, "adaptive")?;
    behind.load(4)?;
    behind.misses()?;
    behind.finish()
}

/// The strict mode with a packed ring.
pub fn packed(scene: &Scene) -> Result<Option<String>> {
    if let Some(reason) = skipped() {
        return Ok(Some(reason));
    }
    let packed = |disk: Disk| disk.prop("packed", true).prop("num-queues", 2);
    let mut behind = Behind::new(scene, "intel_iommu=on iommu.strict=1", "DMA", packed, "adaptive")?;
    // VIRTIO_F_RING_PACKED.
    expect_output(&mut behind.vm, "cut -c35 /sys/block/vda/device/features", "1")?;
    behind.load(2)?;
    let misses = behind.misses()?;
    ensure!(misses > 100, "{misses} misses where every request has new addresses");
    behind.finish()
}
