//! The daemon and its file: what is wrong is said before anything is opened, and nothing that a file says brings it down.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use daemon::file::File;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use vhost_blk::cli::Options;
use vhost_blk::spec::DiskSpec;

const EXAMPLE: &str = include_str!("../../docs/vhost-blk.toml");

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-blk")).args(args).output().unwrap()
}

#[test]
fn the_example_in_the_documentation_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vhost-blk.toml");
    let options = Options::read(&path).unwrap();
    let disks = options.disks();
    let names: Vec<String> = disks.iter().map(DiskSpec::key).collect();
    assert_eq!(names, ["web-system", "web-data", "install", "scratch"]);
    let queues: Vec<u16> = disks.iter().map(|d| d.device(&options.device).num_queues).collect();
    assert_eq!(queues, [4, 8, 1, 4]);
    assert!(disks[2].device(&options.device).read_only && !disks[0].device(&options.device).read_only);
    let out = run(&["--check", "--config", path.to_str().unwrap()]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(String::from_utf8(out.stdout).unwrap(), "nothing is wrong, 4 disks\n");
}

#[test]
fn mistakes_are_one_line_with_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk.sock");
    for (text, said) in [
        ("num-queues = 4\nblock-size = 100\n", ":2: block-size: a block size is a power of two"),
        ("num-queues = 4\n[[disk]]\nsocket-path = 'SOCK'\nimage = 'x'\n", ":4: unknown field `image`"),
        ("queues = 4\n", ":1: unknown field `queues`, expected one of `control`"),
        ("[[disk]]\nsocket-path = 'SOCK'\n", ":1: disk SOCK: blk-file or backend is missing"),
        (
            "[[disk]]\nsocket-path = 'SOCK'\n\nbackend = 'null:512'\nblock-size = 4096\n",
            ":4: disk SOCK: its 512 bytes are no multiple of the block size 4096",
        ),
        (
            "[[disk]]\nsocket-path = 'SOCK'\nbackend = 'null:1M'\n[[disk]]\nsocket-path = 'SOCK'\nbackend = 'null:1M'\n",
            ":5: two disks have the socket SOCK",
        ),
        ("socket-path = 'SOCK'\nbackend = 'null:1M'\nread-only = maybe\n", ":3: "),
        ("poll = 'busy'\n", ": nothing to serve"),
    ] {
        let name = socket.to_str().unwrap();
        let path: PathBuf = dir.path().join("blk.toml");
        std::fs::write(&path, text.replace("SOCK", name)).unwrap();
        let said = format!("vhost-blk: {}{}", path.display(), said.replace("SOCK", name));
        for args in [&["--config"][..], &["--check", "--config"]] {
            let out = run(&[args, &[path.to_str().unwrap()]].concat());
            let stderr = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(1), "{text}: {stderr}");
            assert!(
                stderr.starts_with(&said) && stderr.lines().count() == 1,
                "{text}: {stderr} is not {said}"
            );
        }
        assert!(!socket.exists(), "something was opened");
    }
}

/// Reads what would be a file with this in it.
fn read(text: &str) -> Option<Options> {
    match Options::of(&File::new(Path::new("f"), text.to_owned())) {
        Ok(options) => {
            assert_eq!(options.disks().len(), options.disks().iter().filter_map(DiskSpec::place).count());
            Some(options)
        }
        Err(e) => {
            let said = format!("{e:#}");
            assert!(said.starts_with("f:") && !said.contains('\n'), "{said}");
            None
        }
    }
}

/// Pieces of files, right and wrong.
const PIECES: [&str; 36] = [
    "socket-path",
    "fd",
    "blk-file",
    "backend",
    "disk",
    "[[disk]]",
    "[disk]",
    "name",
    "serial",
    "num-queues",
    "cpus",
    "block-size",
    "poll",
    "read-only",
    "packed",
    "record",
    " = ",
    "=",
    "\n",
    "\n\n",
    "'/a'",
    "'/b'",
    "\"x",
    "'ram:1M'",
    "'null:512'",
    "4",
    "-1",
    "true",
    "18446744073709551616",
    "1e400",
    "[",
    "]",
    "[1, 2]",
    "{ a = 1 }",
    "'busy'",
    "0-1",
];

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..300)) {
        read(&String::from_utf8_lossy(&data));
    }

    #[test]
    fn any_text_of_the_right_words_is_read_or_refused(pieces in prop::collection::vec(select(&PIECES[..]), 0..40)) {
        read(&pieces.concat());
    }

    #[test]
    fn a_good_file_with_a_change_is_read_or_refused(
        changes in prop::collection::vec((any::<Index>(), 0..12usize, "\\PC{0,6}"), 1..4)
    ) {
        let mut text: Vec<char> = EXAMPLE.chars().collect();
        for (at, len, with) in changes {
            let at = at.index(text.len().max(1));
            let end = (at + len).min(text.len());
            text.splice(at..end, with.chars());
        }
        read(&text.into_iter().collect::<String>());
    }

    #[test]
    fn disks_are_read_as_they_are_written(
        queues in prop::collection::vec((1..=256u16, any::<bool>(), prop::option::of("[a-z]{1,8}")), 1..20)
    ) {
        let mut text = String::new();
        for (i, (queues, read_only, name)) in queues.iter().enumerate() {
            let common = format!("num-queues = {queues}\nread-only = {read_only}\n");
            text = text + "[[disk]]\nbackend = 'null:1M'\n" + &format!("socket-path = '/s{i}'\n") + &common;
            text += &name.as_ref().map(|name| format!("name = '{name}{i}'\n")).unwrap_or_default();
        }
        let disks = read(&text).expect("a good file").disks();
        let found: Vec<_> = disks.iter().map(|d| (d.num_queues.unwrap(), d.read_only.unwrap())).collect();
        prop_assert_eq!(found, queues.iter().map(|(n, r, _)| (*n, *r)).collect::<Vec<_>>());
    }
}
