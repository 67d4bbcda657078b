//! Scenarios with a bare-metal guest under KVM: real doorbells, real interrupts, and the daemon as another process.
//!
//! Where there is no KVM every test ends as ignored, with the reason; with `KICKLESS_REQUIRE_KVM` set it fails
//! instead.

mod blocks;
mod clones;
mod harness;
mod interrupts;
mod lifecycle;
mod migration;
mod net;
mod net_recovery;
mod ten_lines;
mod tenants;

use std::path::Path;

use anyhow::Result;
use kickless_tests::daemon::{Daemon, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::runner::{self, Test};
use kickless_tests::scenario::{Guest, Plan, Platform};
use kickless_tests::scene::Scene;

use Platform::{Bare, Microvm};

/// What a scenario does; `Ok(Some(reason))` means that this machine has not what it takes.
type Scenario = fn(&Scene, Platform) -> Result<Option<String>>;

/// All scenarios: name, what it runs on, what it does.
const ALL: &[(&str, Platform, Scenario)] = &[
    ("five_boots_to_the_first_request", Bare, harness::boots),
    ("verified_random_io_on_four_queues", Bare, blocks::four_queues),
    ("verified_random_io_on_four_queues", Microvm, blocks::four_queues),
    ("requests_of_all_sizes", Bare, blocks::sizes),
    ("what_is_written_is_read_back_and_is_in_the_image", Bare, blocks::two_passes),
    ("discarded_and_zeroed_blocks_are_zeroes", Bare, blocks::discard),
    ("direct_descriptors_and_small_rings", Bare, blocks::small_rings),
    ("without_event_index_and_indirect_descriptors", Bare, blocks::few_features),
    ("two_cpus_share_a_disk", Bare, blocks::two_cpus),
    ("two_cpus_share_a_disk", Microvm, blocks::two_cpus),
    ("twenty_four_disks", Bare, blocks::many_disks),
    ("eight_guests_on_clones_of_one_image", Bare, clones::eight),
    ("memory_in_huge_pages", Bare, blocks::huge_pages),
    ("disk_grows_online", Bare, lifecycle::growth),
    ("memory_comes_and_goes_under_load", Bare, lifecycle::memory),
    ("device_reset_again_and_again", Bare, lifecycle::resets),
    ("queues_reset_in_flight", Bare, lifecycle::queue_resets),
    ("device_reset_in_flight", Bare, lifecycle::device_resets_in_flight),
    ("daemon_restarted_under_load", Bare, lifecycle::restarted),
    ("daemon_upgraded_under_load", Bare, lifecycle::upgraded),
    ("daemon_upgraded_under_load", Microvm, lifecycle::upgraded),
    ("daemon_killed_between_requests", Bare, lifecycle::killed),
    ("daemon_killed_under_load", Bare, lifecycle::killed_under_load),
    ("daemon_killed_under_load", Microvm, lifecycle::killed_under_load),
    ("interrupts_are_those_the_ring_asked_for", Bare, interrupts::counted),
    ("no_interrupts_for_a_driver_that_polls", Bare, interrupts::suppressed),
    ("no_wake_up_is_lost_adaptive", Bare, interrupts::wake_ups_adaptive),
    ("no_wake_up_is_lost_event", Bare, interrupts::wake_ups_event),
    ("a_million_requests_without_a_doorbell", Bare, interrupts::doorbells),
    ("packets_come_back", Bare, net::echo),
    ("packets_are_exchanged_in_order", Bare, net::exchange),
    ("a_disk_and_a_network_card", Bare, net::with_disk),
    ("switch_killed_under_load", Bare, net_recovery::killed),
    ("switch_upgraded_under_load", Bare, net_recovery::upgraded),
    ("memory_comes_and_goes_under_packets", Bare, net_recovery::memory),
    ("cards_queues_reset_in_flight", Bare, net_recovery::queue_resets),
    ("a_card_reset_in_flight", Bare, net_recovery::card_resets),
    ("every_misdeed_costs_its_queue_only", Bare, tenants::misdeeds),
    ("a_guest_that_resets_in_flight", Bare, tenants::resets),
    ("a_guest_that_vanishes", Bare, tenants::vanishes),
    ("faults_are_reported_with_registers", Bare, harness::fault),
    ("a_guest_that_hangs_meets_its_deadline", Bare, harness::hang),
    ("features_and_configuration_as_the_specification_has_them", Bare, harness::negotiation),
    ("a_disk_of_qemus_own", Microvm, harness::selftest),
    ("a_guest_migrates_to_and_fro", Microvm, migration::before_its_memory),
    ("a_guest_migrates_before_its_memory", Microvm, migration::after_it_has_come),
    ("a_scenario_of_ten_lines", Bare, ten_lines::restart),
    ("a_scenario_of_ten_lines", Microvm, ten_lines::restart),
];

/// What is run with packed rings, too, in QEMU.
const PACKED_IN_QEMU: &[(&str, Scenario)] = &[
    ("verified_random_io_on_four_queues", blocks::four_queues),
    ("daemon_killed_under_load", lifecycle::killed_under_load),
    ("daemon_upgraded_under_load", lifecycle::upgraded),
    ("a_guest_migrates_in_every_way", migration::every_way),
];

/// What is run with packed rings, too, in the machine of ours.
const PACKED: &[(&str, Scenario)] = &[
    ("queues_reset_in_flight", lifecycle::queue_resets),
    ("device_reset_in_flight", lifecycle::device_resets_in_flight),
    ("verified_random_io_on_four_queues", blocks::four_queues),
    ("requests_of_all_sizes", blocks::sizes),
    ("what_is_written_is_read_back_and_is_in_the_image", blocks::two_passes),
    ("discarded_and_zeroed_blocks_are_zeroes", blocks::discard),
    ("direct_descriptors_and_small_rings", blocks::small_rings),
    ("without_event_index_and_indirect_descriptors", blocks::few_features),
    ("two_cpus_share_a_disk", blocks::two_cpus),
    ("disk_grows_online", lifecycle::growth),
    ("memory_comes_and_goes_under_load", lifecycle::memory),
    ("device_reset_again_and_again", lifecycle::resets),
    ("daemon_restarted_under_load", lifecycle::restarted),
    ("daemon_upgraded_under_load", lifecycle::upgraded),
    ("daemon_killed_between_requests", lifecycle::killed),
    ("daemon_killed_under_load", lifecycle::killed_under_load),
    ("interrupts_are_those_the_ring_asked_for", interrupts::counted),
    ("no_interrupts_for_a_driver_that_polls", interrupts::suppressed),
    ("no_wake_up_is_lost_adaptive", interrupts::wake_ups_adaptive),
    ("no_wake_up_is_lost_event", interrupts::wake_ups_event),
    ("a_million_requests_without_a_doorbell", interrupts::doorbells),
    ("packets_come_back", net::echo),
    ("packets_are_exchanged_in_order", net::exchange),
    ("switch_killed_under_load", net_recovery::killed),
    ("switch_upgraded_under_load", net_recovery::upgraded),
    ("memory_comes_and_goes_under_packets", net_recovery::memory),
    ("cards_queues_reset_in_flight", net_recovery::queue_resets),
    ("a_card_reset_in_flight", net_recovery::card_resets),
    ("every_misdeed_costs_its_queue_only", tenants::misdeeds),
    ("a_guest_that_resets_in_flight", tenants::resets),
    ("a_guest_that_vanishes", tenants::vanishes),
    ("rings_are_packed_where_the_guest_wants_it", harness::packed),
];

fn main() -> std::process::ExitCode {
    let split = ALL.iter().map(|&(name, platform, scenario)| Test {
        name: format!("{platform}::{name}"),
        needs: Box::new(move || platform.missing_needs()),
        run: Box::new(move |scene| scenario(scene, platform)),
    });
    let packed = |name: String, platform: Platform, scenario: Scenario| Test {
        name,
        needs: Box::new(move || platform.missing_needs()),
        run: Box::new(move |scene| {
            scene.use_packed();
            scenario(scene, platform)
        }),
    };
    let ours = PACKED.iter().map(|&(name, scenario)| packed(format!("packed::{name}"), Bare, scenario));
    let qemus = PACKED_IN_QEMU
        .iter()
        .map(|&(name, scenario)| packed(format!("packed::{Microvm}::{name}"), Microvm, scenario));
    runner::run(split.chain(ours).chain(qemus).collect(), "KICKLESS_REQUIRE_KVM")
}

/// A guest with one disk of 64 MiB.
struct OneDisk {
    image: Image,
    daemon: Daemon,
    guest: Box<dyn Guest>,
}

impl OneDisk {
    fn boot(scene: &Scene, platform: Platform, queues: usize) -> Result<Self> {
        Self::boot_with(scene, platform, &|disk| Plan::new().disk(disk, queues))
    }

    fn boot_with(scene: &Scene, platform: Platform, plan: &dyn Fn(&Path) -> Plan) -> Result<Self> {
        Self::make(scene, platform, &Options::default(), plan)
    }

    /// With a daemon that has these options.
    fn boot_as(scene: &Scene, platform: Platform, options: &Options, queues: usize) -> Result<Self> {
        Self::make(scene, platform, options, &|disk| Plan::new().disk(disk, queues))
    }

    fn make(
        scene: &Scene,
        platform: Platform,
        options: &Options,
        plan: &dyn Fn(&Path) -> Plan,
    ) -> Result<Self> {
        let image = Image::create(scene, "disk.img", 64 * MIB)?;
        let daemon = options.spawn(scene, "daemon", &image)?;
        let guest = plan(daemon.socket()).boot(platform, scene)?;
        Ok(Self { image, daemon, guest })
    }

    /// Ends all in good order. The image is left.
    fn finish(self) -> Result<Image> {
        self.guest.power_off()?;
        self.daemon.terminate()?;
        Ok(self.image)
    }
}
