//! Guests whose systems are on clones of one image.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Kind, Medium, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;
use kickless_tests::{process, qemu_img, wait};

const GUESTS: usize = 8;
/// Until all guests are up: emulated ones share the host's CPUs.
const LIMIT: Duration = Duration::from_secs(240);

/// What is on the template besides a shell, and no other file system has.
fn data() -> Vec<u8> {
    (0..MIB as u32 / 4).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

/// Of e2fsprogs.
fn program(name: &str) -> String {
    process::find_program(name).map_or_else(|| name.to_owned(), |path| path.to_string_lossy().into_owned())
}

/// A file system with a shell and data.
fn template(scene: &Scene, busybox: &Path) -> Result<PathBuf> {
    let (tree, plain, image) = (scene.path("tree"), scene.path("template.raw"), scene.path("template.qcow2"));
    fs::create_dir(&tree)?;
    fs::copy(busybox, tree.join("busybox"))?;
    fs::write(tree.join("data"), data())?;
    fs::File::create(&plain)?.set_len(16 * MIB)?;
    let [from, to, tree] = [&plain, &image, &tree].map(|path| path.to_string_lossy());
    let (code, said) = process::run(&program("mkfs.ext4"), &["-q", "-d", &tree, &from])?;
    ensure!(code == 0, "mkfs.ext4: {said}");
    qemu_img::run(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    Ok(image)
}

/// Eight boot at once, run what is on their disks, find the template's data, and keep what they write for themselves.
pub fn eight(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon makes no clones".to_owned()));
    }
    if let Some(reason) = qemu_img::missing() {
        return Ok(Some(reason));
    }
    let Some(busybox) = process::find_program("busybox") else {
        return Ok(Some("no busybox (package busybox-static)".to_owned()));
    };
    let template = template(scene, &busybox)?;
    let before = fs::read(&template)?;
    let path = |i: usize, what: &str| scene.path(&format!("clone-{i}.{what}"));
    let disks: Vec<_> = (0..GUESTS)
        .map(|i| {
            let [socket, file] = ["sock", "qcow2"].map(|what| path(i, what));
            let (socket, file, base) = (socket.display(), file.display(), template.display());
            format!("--disk=socket-path={socket},blk-file={file},clone-of={base}")
        })
        .collect();
    let args: Vec<_> = disks.iter().map(String::as_str).collect();
    let daemon = Options::default().args(&args).spawn(scene, "daemon", Medium::Null(MIB))?;
    // They are made one after the other.
    wait::until("sockets", Duration::from_secs(60), || {
        Ok((0..GUESTS).all(|i| path(i, "sock").exists()).then_some(()))
    })?;
    let start = |i| {
        let disk = Disk::new("disk", &path(i, "sock")).prop("num-queues", 1);
        Vm::builder().cpus(1).disk(disk).start(scene)
    };
    let begun = Instant::now();
    let mut vms: Vec<Vm> = (0..GUESTS).map(start).collect::<Result<_>>()?;
    for (i, vm) in vms.iter_mut().enumerate() {
        if let Err(error) = vm.wait_ready(LIMIT) {
            // As `VmBuilder::boot` does, and why.
            eprintln!("guest {i} has not come up, once more: {error:#}");
            vm.kill()?;
            *vm = start(i)?;
            vm.wait_ready(LIMIT).with_context(|| format!("guest {i}"))?;
        }
    }
    println!("{GUESTS} guests were up after {:.1} s", begun.elapsed().as_secs_f64());
    let own = |i: usize| format!("guest-{i}");
    for (i, vm) in vms.iter_mut().enumerate() {
        let sh = format!("chroot /mnt /busybox sh -c 'echo {} >/own; /busybox cp /data /copy'", own(i));
        vm.check(&format!("mount /dev/vda /mnt && {sh} && umount /mnt"))?;
    }
    // By then all have written.
    for (i, vm) in vms.iter_mut().enumerate() {
        let found = vm.check("mount -o ro /dev/vda /mnt && cmp /mnt/data /mnt/copy && cat /mnt/own")?;
        ensure!(found.trim() == own(i), "guest {i} has found {found:?}");
    }
    vms.into_iter().try_for_each(Vm::quit)?;
    daemon.terminate()?;
    for i in 0..GUESTS {
        let [clone, plain] = ["qcow2", "raw"].map(|what| path(i, what));
        qemu_img::check(&clone)?;
        let [from, to] = [&clone, &plain].map(|path| path.to_string_lossy());
        qemu_img::run(&["convert", "-f", "qcow2", "-O", "raw", &from, &to])?;
        Image::at(plain.clone()).fsck().with_context(|| format!("clone {i}"))?;
        let copied = path(i, "data");
        let dump = format!("dump /copy {}", copied.display());
        let (_, said) = process::run(&program("debugfs"), &["-R", &dump, &to])?;
        ensure!(fs::read(&copied).is_ok_and(|bytes| bytes == data()), "clone {i} has other data: {said}");
        fs::remove_file(&plain)?;
    }
    ensure!(fs::read(&template)? == before, "the template was written to");
    Ok(None)
}
