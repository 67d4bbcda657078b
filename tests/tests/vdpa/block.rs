//! Disks: a plain `/dev/vdX`, and `/dev/vhost-vdpa-N`.

use anyhow::{Result, ensure};
use kickless_tests::qemu::Vm;
use kickless_tests::scene::Scene;
use serde_json::Value;
use std::time::Duration;

use crate::confined;
use crate::guest::{LIMIT, compare_with_iproute2, gone, guest, prepare, refused, said, serve, signal};
use crate::nested::{self, virtual_machine};

const ATTACH: &str = "attach /disk/image.img --num-queues 4 --queue-size 128";

/// How often a disk comes and goes.
fn rounds() -> u32 {
    std::env::var("KICKLESS_VDPA_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

pub fn disks(scene: &Scene) -> Result<Option<String>> {
    let file = scene.path("host.img");
    std::fs::File::create(&file)?.set_len(512 << 20)?;
    let drive = format!("if=none,id=host,format=raw,file={}", file.display());
    let vm = guest(scene)?.cpus(4).arg("drive", &drive).arg("device", "virtio-blk-pci,drive=host");
    let mut vm = nested::files(vm, scene)?.boot(scene)?;
    prepare(&mut vm)?;
    // Images on a real file system: io_uring, direct I/O.
    vm.check(
        "mkfs.ext4 -q /dev/vda && mkdir /disk && mount /dev/vda /disk && truncate -s 64M /disk/image.img",
    )?;

    let node = serve(&mut vm, "image", ATTACH)?;
    ensure!(node == "/dev/vdb", "it is {node}");
    compare_with_iproute2(&mut vm, "image")?;
    confined::expect(&mut vm, "image")?;
    by_either(&mut vm)?;
    confined::hijacked_threads_reach_nothing(&mut vm)?;
    let queues = vm.check("vdpactl list --json")?;
    ensure!(queues.contains("\"max_vqs\":4") && queues.contains("\"max_vq_size\":128"), "{queues}");
    let features = vm.check("cat /sys/bus/vdpa/devices/image/virtio*/features")?;
    ensure!(features.as_bytes()[34] == b'1', "the ring is not packed: {features}");

    file_system(&mut vm)?;
    four_queues(&mut vm)?;
    discard(&mut vm)?;
    grow(&mut vm)?;
    killed_under_load(&mut vm, "image", ATTACH, "/dev/vdb", 3)?;
    vm.check("vdpactl detach /disk/image.img")?;
    gone(&mut vm, "image")?;
    vm.check("! test -e /dev/vdb && ! test -e /dev/vduse/image && ! test -e /run/kickless-vdpa/image")?;

    for round in 0..rounds() {
        serve(&mut vm, "image", ATTACH)?;
        vm.check("dd if=/dev/vdb of=/dev/null bs=64K count=4 iflag=direct 2>/dev/null")?;
        match round % 3 {
            0 => signal(&mut vm, "image", "TERM")?,
            1 => signal(&mut vm, "image", "INT")?,
            _ => {
                vm.check("vdpactl detach image")?;
                gone(&mut vm, "image")?;
            }
        }
        vm.check("! test -e /dev/vdb && ! test -e /dev/vduse/image")?;
    }
    confined::by_another_user(&mut vm)?;
    taken_away_as_it_is(&mut vm)?;
    formatted(&mut vm)?;
    own_memory(&mut vm)?;
    vhost_vdpa(&mut vm)?;
    virtual_machine(&mut vm)?;
    refusals(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

/// A device is put on the bus and taken from it by iproute2 or by us; whoever serves it goes on.
fn by_either(vm: &mut Vm) -> Result<()> {
    let blk = "serve blk --name null --backend null:64M --queue-size 64";
    vm.check(&format!("vdpactl {blk} 2>/tmp/null.log >/dev/null & echo $! >/tmp/null.pid"))?;
    vm.check_soon("test -e /dev/vduse/null", LIMIT)?;
    let [(add, del), (their_add, their_del)] = [
        ("vdpactl add null --driver vhost", "vdpactl del null"),
        ("vdpa dev add mgmtdev vduse name null", "vdpa dev del null"),
    ];
    for (add, del) in [(add, their_del), (their_add, del)] {
        vm.check_soon(add, LIMIT)?;
        ensure!(
            vm.check("vdpactl list")?.contains("null: type block mgmtdev vduse"),
            "{add}: it is not there"
        );
        vm.check(del)?;
        ensure!(!vm.check("vdpa dev show")?.contains("null:"), "{del}: it is still there");
    }
    vm.check("test -e /proc/$(cat /tmp/null.pid)/exe")?;
    signal(vm, "null", "TERM")
}

fn file_system(vm: &mut Vm) -> Result<()> {
    vm.check("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && head -c 5000000 /dev/urandom >/mnt/a && sync")?;
    let sum = vm.check("sha256sum </mnt/a")?;
    // Neither a signal nor a detach takes a mounted disk away.
    let refused = vm.run("vdpactl detach image")?;
    ensure!(refused.code == 1 && refused.stdout.contains("in use"), "{}", refused.stdout);
    vm.check("kill -TERM $(cat /tmp/image.pid) && sleep 1 && umount /mnt && mount /dev/vdb /mnt")?;
    ensure!(vm.check("sha256sum </mnt/a")? == sum, "the file is another one");
    vm.check("umount /mnt && e2fsck -fn /dev/vdb")?;
    Ok(())
}

/// A mounted disk, by those who mean it: a second signal, and a detach that says so.
fn taken_away_as_it_is(vm: &mut Vm) -> Result<()> {
    // All that the file system still wants to write then.
    for words in
        ["logical block 1, lost sync page write", "while writing superblock", "updating journal superblock"]
    {
        vm.tolerate(words);
    }
    for by_signal in [true, false] {
        serve(vm, "image", ATTACH)?;
        let mkfs = "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0";
        vm.check(&format!("{mkfs} /dev/vdb && mount /dev/vdb /mnt"))?;
        if by_signal {
            vm.check("kill -TERM $(cat /tmp/image.pid)")?;
            vm.check_soon("tail -n 1 /tmp/image.log | grep -q 'is in use: unmount it'", LIMIT)?;
            signal(vm, "image", "TERM")?;
        } else {
            refused(vm, "vdpactl detach image", "is in use")?;
            vm.check("vdpactl detach image --force")?;
            gone(vm, "image")?;
        }
        vm.check("! test -e /dev/vduse/image && ! test -e /run/kickless-vdpa/image && umount /mnt")?;
    }
    Ok(())
}

/// An image in a format of its own: what is written is there when it is served again.
fn formatted(vm: &mut Vm) -> Result<()> {
    let attach = "attach /usr/share/image.qcow2 --format qcow2";
    for write in [true, false] {
        let node = serve(vm, "image", attach)?;
        ensure!(vm.check(&format!("blockdev --getsize64 {node}"))? == "33554432");
        let copy = if write { "dd if=/bin/busybox of=NODE conv=fsync" } else { "dd if=NODE of=/tmp/copy" };
        vm.check(&format!("{} bs=4k count=100 2>/dev/null", copy.replace("NODE", &node)))?;
        signal(vm, "image", "TERM")?;
    }
    vm.check("cmp -n 409600 /tmp/copy /bin/busybox && rm /tmp/copy")?;
    Ok(())
}

/// What is discarded takes no room in the image any more and reads as zeroes; so does what is zeroed.
fn discard(vm: &mut Vm) -> Result<()> {
    vm.check(
        "head -c 8388608 /dev/urandom | dd of=/dev/vdb bs=1M iflag=fullblock oflag=direct 2>/dev/null && sync",
    )?;
    let blocks = |vm: &mut Vm| -> Result<u64> { Ok(vm.check("stat -c %b /disk/image.img")?.parse()?) };
    let before = blocks(vm)?;
    vm.check("blkdiscard -f -o 1M -l 2M /dev/vdb && blkdiscard -z -o 4M -l 1M /dev/vdb")?;
    let after = blocks(vm)?;
    ensure!(
        after + 4096 <= before,
        "{before} blocks of 512 bytes before 2 MiB were discarded, {after} after"
    );
    for (skip, count) in [(1, 2), (4, 1)] {
        let read = format!("dd if=/dev/vdb bs=1M skip={skip} count={count} iflag=direct 2>/dev/null");
        vm.check(&format!("{read} | cmp -n {} - /dev/zero", count << 20))?;
    }
    vm.check("! dd if=/dev/vdb bs=1M count=1 iflag=direct 2>/dev/null | cmp -s -n 1048576 - /dev/zero")?;
    Ok(())
}

/// Writes that are read back, with flushes among them: a job on each CPU, whose requests go by a queue of its own.
fn four_queues(vm: &mut Vm) -> Result<()> {
    let job =
        "--name=v --filename=/dev/vdb --rw=randwrite --bs=4k --size=2M --offset_increment=8M --direct=1";
    // The driver knows of a cache, and has it flushed.
    ensure!(vm.check("cat /sys/block/vdb/queue/write_cache")? == "write back");
    let flushes =
        |vm: &mut Vm| -> Result<u64> { Ok(vm.check("awk '{ print $16 }' /sys/block/vdb/stat")?.parse()?) };
    let before = flushes(vm)?;
    let jobs = "--numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split --ioengine=libaio --iodepth=32";
    let said = vm.run_for(&format!("fio {job} {jobs} --fsync=64 --verify=crc32c --minimal"), 2 * LIMIT)?;
    ensure!(said.code == 0, "fio: {}", said.stdout);
    // One for each 64 of 512 writes, of each job; some may have gone together.
    let flushed = flushes(vm)? - before;
    ensure!(flushed >= 8, "{flushed} flushes");
    vm.check("kill -USR1 $(cat /tmp/image.pid)")?;
    vm.check_soon("test $(wc -l </tmp/image.node) -gt 5", LIMIT)?;
    let report = vm.check("cat /tmp/image.node")?;
    for queue in 0..4 {
        let line = report.lines().find(|line| line.split_whitespace().next() == Some(&queue.to_string()));
        // 512 writes, and as many reads.
        let requests = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        ensure!(requests.is_some_and(|n| n > 500), "queue {queue} has done nothing: {report}");
    }
    Ok(())
}

fn grow(vm: &mut Vm) -> Result<()> {
    vm.check("truncate -s 96M /disk/image.img")?;
    signal(vm, "image", "HUP")?;
    vm.check_soon("test $(blockdev --getsize64 /dev/vdb) = 100663296", LIMIT)
}

/// Whatever was in flight is finished by the next process. Kills come by what was done, not by time.
fn killed_under_load(vm: &mut Vm, name: &str, args: &str, node: &str, kills: u64) -> Result<()> {
    let job =
        format!("--name=k --filename={node} --rw=randrw --bs=4k --size=24M --direct=1 --ioengine=libaio");
    let done = format!("awk '{{ print $1 + $5 }}' /sys/block/{}/stat", node.trim_start_matches("/dev/"));
    let before: u64 = vm.check(&done)?.parse()?;
    // More than 9,000 requests in each loop, of which a part is in flight at each kill.
    let more = format!("--iodepth=64 --verify=crc32c --verify_fatal=1 --loops={} --minimal", kills + 1);
    vm.start(name, &format!("fio {job} {more}"))?;
    for kill in 1..=kills {
        vm.check_soon(&format!("test $({done}) -gt {}", before + kill * 5000), 2 * LIMIT)?;
        ensure!(vm.is_running(name)?, "the load has ended too early");
        signal(vm, name, "KILL")?;
        let now = serve(vm, name, args)?;
        ensure!(now == node, "it is {now}");
    }
    let load = vm.join(name, 3 * LIMIT)?;
    let log = said(vm, name);
    ensure!(load.code == 0, "fio: {}\n{log}", load.stdout);
    ensure!(log.matches("going on with its driver").count() as u64 == kills, "{log}");
    // Of several kills one at least meets requests in flight.
    let again = log.contains("requests of an earlier back end are served again");
    ensure!(kills == 1 || again, "nothing was in flight: {log}");
    Ok(())
}

/// Pages bounce through huge pages of ours; the ring is a split one.
fn own_memory(vm: &mut Vm) -> Result<()> {
    vm.check("echo 8 >/proc/sys/vm/nr_hugepages")?;
    let args = "attach /disk/image.img --name huge --bounce huge --bounce-size 8M --packed off";
    let node = serve(vm, "huge", args)?;
    ensure!(vm.check("cat /sys/class/vduse/huge/bounce_size")? == "8388608");
    // The pages of the killed process are gone, and what was in them is not.
    killed_under_load(vm, "huge", args, &node, 1)?;
    let log = said(vm, "huge");
    ensure!(log.matches("8 MiB of our own huge pages").count() == 2, "{log}");
    signal(vm, "huge", "TERM")?;
    vm.check("test $(awk '/HugePages_Free/ { print $2 }' /proc/meminfo) = 8")?;
    Ok(())
}

/// The same disk for an independent driver; one of a killed process is taken away.
fn vhost_vdpa(vm: &mut Vm) -> Result<()> {
    let node = serve(vm, "v", "attach /disk/image.img --name v --driver vhost --num-queues 2")?;
    ensure!(node == "/dev/vhost-vdpa-0", "it is {node}");
    for _ in 0..2 {
        let client = vm.run_for(&format!("client client {node}"), LIMIT + Duration::from_secs(30))?;
        ensure!(client.code == 0, "{}\n{}", client.stdout, said(vm, "v"));
    }
    load(vm, &node)?;
    signal(vm, "v", "KILL")?;
    vm.check("vdpactl detach")?;
    vm.check("! test -e /dev/vhost-vdpa-0 && ! test -e /dev/vduse/v && ! test -e /run/kickless-vdpa/v")?;
    Ok(())
}

/// Our load generator, with rings of both formats, on both queues.
fn load(vm: &mut Vm, node: &str) -> Result<()> {
    let run = format!("vbench run --socket-path {node}");
    for more in ["--indirect", "--packed"] {
        let parts = "--numjobs 2 --size 2M --offset-increment 8M";
        let job = format!("{run} --rw randwrite {parts} --iodepth 16 --completion interrupt {more}");
        let done = vm.run_for(&format!("{job} --verify crc32c --json=-"), 2 * LIMIT)?;
        ensure!(done.code == 0, "{more}: {}\n{}", done.stdout, said(vm, "v"));
        let result: Value = serde_json::from_str(&done.stdout)?;
        let done = |what: &str| -> u64 {
            let jobs = result["jobs"].as_array().into_iter().flatten();
            jobs.map(|job| job[what]["total_ios"].as_u64().unwrap_or(0)).sum()
        };
        // All of it, and all of it read back.
        ensure!((done("write"), done("read")) == (1024, 1024), "{result}");
    }
    for (command, why) in [
        (format!("{run} --inflight"), "vhost-user's front ends only"),
        (format!("{run} --numjobs 3"), "has 2 queues"),
        (format!("{run} --iodepth 1000"), "at most 1024"),
        (format!("vbench net --socket-path {node}"), "vbench run drives those"),
    ] {
        let refused = vm.run(&command)?;
        ensure!(refused.code == 1 && refused.stdout.contains(why), "{command}: {}", refused.stdout);
    }
    Ok(())
}

fn refusals(vm: &mut Vm) -> Result<()> {
    serve(vm, "one", "attach /disk/image.img --name one --driver vhost")?;
    let attach = "vdpactl attach /disk/image.img";
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    for (command, why) in [
        ("vdpactl serve blk --backend null:1G --name one", "served by process"),
        (&format!("{attach} --name two"), "another process has it open"),
        ("vdpactl add three", "three"),
        ("vdpactl detach three", "no device three"),
        // A name that is taken by somebody whose record we do not have.
        ("vdpactl serve blk --backend null:1G --name one --state-dir /tmp/other", "vdpactl detach one"),
        (
            &format!("{nobody} vdpactl serve blk --backend null:1G --name two --state-dir /tmp/nobody"),
            "cannot open /dev/vduse/control: Permission denied",
        ),
        ("setpriv --bounding-set -net_admin vdpactl serve net --name c --port name=d", "CAP_NET_ADMIN"),
        ("setpriv --bounding-set -net_admin vdpactl del one", "CAP_NET_ADMIN"),
    ] {
        refused(vm, command, why)?;
    }
    vm.check("! test -e /dev/vduse/c && ! test -e /run/kickless-vdpa/c && ! test -e /run/kickless-vdpa/two")?;
    signal(vm, "one", "TERM")?;
    vm.check("modprobe -r virtio_vdpa vhost_vdpa vduse 2>/dev/null; rmmod virtio_vdpa; rmmod vhost_vdpa; rmmod vduse; ! test -e /dev/vduse/control")?;
    refused(vm, attach, "modprobe")
}
