//! The scenarios, by what they are about.

mod clones;
mod data;
mod features;
mod iommu;
mod lifecycle;
mod memory;
mod migration;

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Daemon, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;

/// A scenario: `Ok(Some(reason))` means that this machine has not what it takes.
pub type Scenario = fn(&Scene) -> Result<Option<String>>;

/// All scenarios with their names.
pub const ALL: &[(&str, Scenario)] = &[
    ("ext4_holds_what_was_written", data::ext4),
    ("verified_random_io_on_four_queues", data::four_queues),
    ("queues_on_two_reactors", data::two_reactors),
    ("two_disks_one_polled_one_event_driven", data::two_disks),
    ("buffered_and_writethrough", data::buffered_and_writethrough),
    ("discard_punches_holes_and_write_zeroes_zeroes", data::discard),
    ("write_cache_toggles_under_load", data::write_cache),
    ("read_only_disk_and_serial", features::read_only),
    ("logical_blocks_of_4096_bytes", features::block_size),
    ("disk_grows_online", features::growth),
    ("iommu_platform", features::iommu_platform),
    ("iommu_platform_with_bounce_buffers", features::swiotlb),
    ("viommu_maps_and_unmaps_for_every_request", iommu::strict),
    ("viommu_invalidates_in_batches", iommu::lazy),
    ("viommu_and_packed_rings", iommu::packed),
    ("viommu_in_passthrough_mode", iommu::passthrough),
    ("guest_reboots", lifecycle::reboot),
    ("machine_stopped_and_continued_under_load", lifecycle::stop_and_continue),
    ("front_end_killed_under_load", lifecycle::front_end_killed),
    ("disk_unplugged_and_plugged_again", lifecycle::replug),
    ("disk_unplugged_under_load", lifecycle::unplug_under_load),
    ("driver_unbound_and_bound_under_load", lifecycle::driver_rebound),
    ("daemon_restarted_under_load", lifecycle::daemon_restarted),
    ("daemon_upgraded_under_load", lifecycle::daemon_upgraded),
    ("daemon_killed_under_load", lifecycle::daemon_killed),
    ("memory_plugged_and_unplugged_under_load", memory::hotplug),
    ("memory_in_many_regions", memory::many_regions),
    ("guest_migrates_under_load", migration::every_way),
    ("eight_guests_on_clones_of_one_image", clones::eight),
];

/// Those that are run with packed rings, too.
pub const PACKED: &[(&str, Scenario)] = &[
    ("verified_random_io_on_four_queues", data::four_queues),
    ("iommu_platform_with_bounce_buffers", features::swiotlb),
    ("guest_reboots", lifecycle::reboot),
    ("machine_stopped_and_continued_under_load", lifecycle::stop_and_continue),
    ("driver_unbound_and_bound_under_load", lifecycle::driver_rebound),
    ("disk_unplugged_and_plugged_again", lifecycle::replug),
    ("disk_unplugged_under_load", lifecycle::unplug_under_load),
    ("front_end_killed_under_load", lifecycle::front_end_killed),
    ("daemon_restarted_under_load", lifecycle::daemon_restarted),
    ("daemon_upgraded_under_load", lifecycle::daemon_upgraded),
    ("daemon_killed_under_load", lifecycle::daemon_killed),
    ("memory_plugged_and_unplugged_under_load", memory::hotplug),
    ("guest_migrates_under_load", migration::every_way),
];

/// How long a run of fio may take.
const FIO_LIMIT: Duration = Duration::from_secs(180);

/// A machine with one disk.
struct OneDisk {
    image: Image,
    daemon: Daemon,
    vm: Vm,
}

impl OneDisk {
    /// An empty disk of 64 MiB, served with the default options.
    fn new(scene: &Scene) -> Result<Self> {
        Self::with(scene, &Options::default())
    }

    /// An empty disk of 64 MiB.
    fn with(scene: &Scene, options: &Options) -> Result<Self> {
        let image = Image::create(scene, "disk.img", 64 * MIB)?;
        let daemon = options.spawn(scene, "daemon", &image)?;
        let vm = Vm::builder().disk(Disk::new("disk", daemon.socket())).boot(scene)?;
        Ok(Self { image, daemon, vm })
    }

    /// Ends all in good order, each of them making sure that it was.
    fn finish(self) -> Result<Image> {
        self.vm.quit()?;
        self.daemon.terminate()?;
        Ok(self.image)
    }
}

/// Makes a file system on a disk, mounts it at `/mnt` and fills some files. Their checksums are the result.
fn populate(vm: &mut Vm, disk: &str) -> Result<String> {
    vm.check(&format!("mkfs.ext4 -q -F /dev/{disk} && mount /dev/{disk} /mnt"))?;
    // Random bytes and checksums are dear under emulation: pieces of one file, of odd lengths.
    vm.check(
        "mkdir /mnt/d && dd if=/dev/urandom of=/tmp/random bs=64k count=4 2>/dev/null && for i in $(seq 1 24); do \
         tail -c +$((i * 31)) /tmp/random | head -c $((i * 6007)) >/mnt/d/f$i || exit 1; done",
    )?;
    let sums = checksums(vm)?;
    ensure!(sums.lines().count() == 24, "checksums: {sums}");
    vm.check("sync")?;
    Ok(sums)
}

/// The checksums of the files that [`populate`] has made, read from the disk rather than from memory.
fn checksums(vm: &mut Vm) -> Result<String> {
    vm.check("sync; echo 3 >/proc/sys/vm/drop_caches; cd /mnt/d && sha256sum *")
}

/// Mounts the file system that [`populate`] has made and fails unless the files are as they were.
fn verify(vm: &mut Vm, disk: &str, sums: &str) -> Result<()> {
    vm.check(&format!("mount /dev/{disk} /mnt"))?;
    let found = checksums(vm)?;
    ensure!(found == sums, "the files differ:\n{found}\nwere:\n{sums}");
    vm.check(&format!("umount /mnt && e2fsck -fn /dev/{disk}"))?;
    Ok(())
}

/// Fails unless a command in the guest prints `want`.
fn expect_output(vm: &mut Vm, command: &str, want: &str) -> Result<()> {
    let found = vm.check(command)?;
    ensure!(found == want, "guest command `{command}`: {found:?}, expected {want:?}");
    Ok(())
}
