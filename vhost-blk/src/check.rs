//! What is asked for, held against itself before anything is opened.

use std::collections::HashSet;

use daemon::file::{Step, Wrong};

use crate::backend::formatted::Format;
use crate::cli::{DeviceOptions, Options, Synthetic};
use crate::spec::DiskSpec;

/// The first thing that is wrong, if anything is.
pub fn check(options: &Options) -> Result<(), Wrong> {
    first_disk(options)?;
    options.run.check()?;
    let disks = options.disks();
    if !options.pool.is_empty() && options.http.api.is_none() {
        return Err(Wrong::new(
            &[Step::Key("pool")],
            "clones are taken out of a pool over the API; give it a socket with --api",
        ));
    }
    // With the API, they may come later.
    if disks.is_empty() && options.http.api.is_none() {
        return Err(Wrong::new(
            &[],
            "nothing to serve; give --socket-path and --blk-file, or --disk (see --help)",
        ));
    }
    // Those of the list are the last ones.
    let listed = disks.len() - options.disk.len();
    let place = |i: usize, key: Option<&'static str>| match (i.checked_sub(listed), key) {
        (Some(item), key) => {
            [Step::Key("disk"), Step::Item(item)].into_iter().chain(key.map(Step::Key)).collect()
        }
        (None, key) => key.map(Step::Key).into_iter().collect::<Vec<_>>(),
    };
    for (i, spec) in disks.iter().enumerate() {
        disk(spec, &options.device)
            .map_err(|(key, why)| Wrong::new(&place(i, key), format!("disk {}: {why}", spec.key())))?;
    }
    for (what, key, of) in NAMED {
        let mut seen = HashSet::new();
        for (i, disk) in disks.iter().enumerate() {
            let Some(is) = of(disk) else { continue };
            if !seen.insert(is.clone()) {
                return Err(Wrong::new(&place(i, Some(key)), twice(what, &is)));
            }
        }
    }
    Ok(())
}

type Named = fn(&DiskSpec) -> Option<String>;

/// What no two disks have together.
const NAMED: [(&str, &str, Named); 3] = [
    ("the socket", "socket-path", |disk| disk.place().map(|place| place.key())),
    ("the name", "name", |disk| Some(disk.key())),
    ("the record", "record", |disk| disk.record.as_deref().map(daemon::path_key)),
];

fn twice(what: &str, is: &str) -> String {
    format!("two disks have {what} {is}; give each its own")
}

/// What is wrong with a disk that is to be served beside others, of which `is_taken` says whether one has this for a key: the
/// key, and why.
pub fn beside(
    spec: &DiskSpec,
    all: &DeviceOptions,
    is_taken: impl Fn(&str, &str) -> bool,
) -> Result<(), DiskWrong> {
    disk(spec, all)?;
    for (what, key, of) in NAMED {
        if let Some(is) = of(spec).filter(|is| is_taken(key, is)) {
            return Err((Some(key), twice(what, &is)));
        }
    }
    Ok(())
}

/// The first disk, as options of its own describe it.
fn first_disk(options: &Options) -> Result<(), Wrong> {
    let Options { socket_path, fd, blk_file, backend, record, .. } = options;
    let is_there =
        [("blk-file", blk_file.is_some()), ("backend", backend.is_some()), ("record", record.is_some())];
    let there = is_there.iter().find(|(_, there)| *there).map(|(key, _)| *key);
    match (socket_path.is_some() || fd.is_some(), there) {
        (false, Some("record")) => Err(Wrong::new(
            &[Step::Key("record")],
            "--record goes with --blk-file or --backend; write --disk ...,record=FILE for further disks",
        )),
        (false, Some(key)) => Err(Wrong::new(
            &[Step::Key(key)],
            "nowhere to serve it; name a socket with --socket-path, or pass one with --fd",
        )),
        (true, None | Some("record")) => Err(Wrong::new(
            &[Step::Key(if fd.is_some() { "fd" } else { "socket-path" })],
            "nothing to serve; name an image with --blk-file, or a --backend",
        )),
        _ => Ok(()),
    }
}

/// A key, and what is wrong with it.
pub type DiskWrong = (Option<&'static str>, String);

fn disk(disk: &DiskSpec, all: &DeviceOptions) -> Result<(), DiskWrong> {
    let fail = |key: &'static str, why: &str| Err((Some(key), why.to_owned()));
    let is_empty =
        |path: &Option<std::path::PathBuf>| path.as_ref().is_some_and(|p| p.as_os_str().is_empty());
    for (key, path) in [
        ("socket-path", &disk.socket_path),
        ("blk-file", &disk.blk_file),
        ("record", &disk.record),
        ("key-file", &disk.key_file),
    ] {
        if is_empty(path) {
            return fail(key, &format!("{key} is empty"));
        }
    }
    match (&disk.socket_path, disk.fd) {
        (Some(_), Some(_)) => return fail("fd", "socket-path and fd exclude each other"),
        (None, None) => return Err((None, "socket-path is missing".into())),
        _ => {}
    }
    match (&disk.blk_file, disk.backend) {
        (Some(_), Some(_)) => return fail("backend", "blk-file and backend exclude each other"),
        (None, None) => return Err((None, "blk-file or backend is missing".into())),
        _ => {}
    }
    if disk.clone_of.is_some() {
        if disk.backend.is_some() {
            return fail("clone-of", "clone-of goes with blk-file, the file of the clone");
        }
        if !matches!(disk.format, Format::Raw | Format::Qcow2) {
            return fail("format", "a clone is a qcow2 image; leave format out");
        }
    }
    match disk.format {
        Format::Raw => {}
        _ if disk.backend.is_some() => return fail("format", "format goes with blk-file"),
        Format::Vmdk if !disk.device(all).read_only => {
            return fail(
                "format",
                "vmdk images can only be read; add read-only, or convert it (qemu-img convert)",
            );
        }
        _ => {}
    }
    key(disk)?;
    let device = disk.device(all);
    if disk.backend.is_some() && device.fault.is_some_and(|fault| fault.log_writes.is_some()) {
        return fail("fault", "log-writes goes with blk-file");
    }
    let block_size = device.block_size;
    if let Some(Synthetic::Ram(size) | Synthetic::Null(size)) = disk.backend
        && !size.is_multiple_of(block_size.into())
    {
        return fail("backend", &format!("its {size} bytes are no multiple of the block size {block_size}"));
    }
    Ok(())
}

/// Volumes have one key, others none.
fn key(disk: &DiskSpec) -> Result<(), DiskWrong> {
    let keys = [
        ("key-file", disk.key_file.is_some()),
        ("key-fd", disk.key_fd.is_some()),
        ("key-credential", disk.key_credential.is_some()),
    ];
    let said: Vec<_> = keys.iter().filter(|(_, said)| *said).map(|(key, _)| *key).collect();
    let is_luks = disk.format == Format::Luks;
    match said[..] {
        [key, ..] if !is_luks => Err((Some(key), format!("{key} goes with format luks"))),
        [first, second, ..] => Err((Some(second), format!("{first} and {second} exclude each other"))),
        [] if is_luks => {
            Err((Some("format"), "luks needs its key; give key-file, key-fd or key-credential".into()))
        }
        _ if disk.allow_discards && !is_luks => {
            Err((Some("allow-discards"), "allow-discards goes with format luks".into()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn said(args: &str) -> Result<(), Wrong> {
        check(&Cli::parse_from(args.split(' ')).options)
    }

    #[test]
    fn what_goes_together() {
        for args in [
            "x --socket-path=/s --blk-file=/f",
            "x --fd=3 --backend=ram:1M --record=/r",
            "x --socket-path=/s --blk-file=/f --format=vmdk --read-only",
            "x --disk=socket-path=/s,blk-file=/f,format=qcow2",
            "x --socket-path=/s --blk-file=/f --format=luks --key-file=/k --allow-discards",
            "x --socket-path=/s --blk-file=/f --format=luks --key-fd=5",
            "x --disk=socket-path=/s,blk-file=/f,format=luks,key-credential=k,read-only",
            "x --disk=socket-path=/s,blk-file=/f,clone-of=raw:/b",
            "x --api=/a --pool=/b:8",
            "x --disk=socket-path=/s,backend=null:4K,block-size=4096",
            "x --socket-path=/a --blk-file=/f --disk=socket-path=/b,blk-file=/f,read-only",
            "x --disk=socket-path=/a,backend=null:1G,name=a --disk=fd=4,backend=null:1G",
        ] {
            assert_eq!(said(args), Ok(()), "{args}");
        }
    }

    #[test]
    fn what_does_not_is_said_with_its_place() {
        let [disk, item] = [Step::Key("disk"), Step::Item(0)];
        let of = |key| vec![disk, item, Step::Key(key)];
        let top = |key| vec![Step::Key(key)];
        for (args, at) in [
            ("x", vec![]),
            ("x --socket-path=/s", top("socket-path")),
            ("x --fd=3", top("fd")),
            ("x --blk-file=/f", top("blk-file")),
            ("x --backend=ram:1M", top("backend")),
            ("x --record=/r --disk=socket-path=/a,backend=null:1G", top("record")),
            ("x --socket-path=/s --fd=3 --blk-file=/f", top("fd")),
            ("x --socket-path=/s --blk-file=/f --backend=ram:1M", top("backend")),
            ("x --disk=socket-path=,blk-file=/f", of("socket-path")),
            ("x --socket-path=/s --backend=ram:512 --block-size=4096", top("backend")),
            ("x --disk=blk-file=/f", vec![disk, item]),
            ("x --disk=socket-path=/s", vec![disk, item]),
            ("x --disk=socket-path=/s,fd=3,blk-file=/f", of("fd")),
            ("x --disk=socket-path=/s,blk-file=/f,backend=null:1G", of("backend")),
            ("x --disk=socket-path=/s,blk-file=/f,format=vmdk", of("format")),
            ("x --socket-path=/s --backend=ram:1M --format=qcow2", top("format")),
            ("x --socket-path=/s --backend=ram:1M --clone-of=/b", top("clone-of")),
            ("x --socket-path=/s --blk-file=/f --format=vmdk --clone-of=/b --read-only", top("format")),
            ("x --socket-path=/s --blk-file=/f --format=luks", top("format")),
            ("x --socket-path=/s --blk-file=/f --format=luks --key-file=/k --key-fd=3", top("key-fd")),
            ("x --socket-path=/s --blk-file=/f --key-credential=k", top("key-credential")),
            ("x --socket-path=/s --blk-file=/f --allow-discards", top("allow-discards")),
            ("x --socket-path=/s --blk-file=/f --format=luks --key-fd=3 --clone-of=/b", top("format")),
            ("x --socket-path=/s --blk-file=/f --pool=/b:8", top("pool")),
            ("x --socket-path=/s --backend=ram:1M --fault=log-writes=/w", top("fault")),
            ("x --disk=socket-path=/s,backend=null:512,block-size=4096", of("backend")),
            ("x --socket-path=/s --blk-file=/f --disk=socket-path=/s,blk-file=/g", of("socket-path")),
            ("x --socket-path=/s --blk-file=/f --disk=socket-path=/t,blk-file=/g,name=/s", of("name")),
            (
                "x --socket-path=/s --blk-file=/f --record=/r --disk=socket-path=/t,blk-file=/g,record=/r",
                of("record"),
            ),
        ] {
            assert_eq!(said(args).map_err(|e| e.at), Err(at), "{args}");
        }
    }

    #[test]
    fn a_disk_that_comes_later_has_what_no_other_has() {
        let spec = |s: &str| s.parse::<DiskSpec>().unwrap();
        let others = [spec("socket-path=/a,backend=null:1G,name=a")];
        let is_taken = |key: &str, is: &str| {
            let of = NAMED.iter().find(|named| named.1 == key).unwrap().2;
            others.iter().any(|other| of(other).as_deref() == Some(is))
        };
        let said = |s: &str| beside(&spec(s), &DeviceOptions::default(), is_taken).map_err(|(key, _)| key);
        assert_eq!(said("socket-path=/b,backend=null:1G"), Ok(()));
        assert_eq!(said("socket-path=/b,backend=null:1G,name=a"), Err(Some("name")));
        assert_eq!(said("socket-path=/a,backend=null:1G"), Err(Some("socket-path")));
        assert_eq!(said("socket-path=/b"), Err(None));
    }
}
