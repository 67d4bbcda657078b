//! What the daemons show to the outside, which is no network; and how `vhostctl` looks to a terminal and to a shell.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use kickless_tests::process::built;
use kickless_tests::wait;

use crate::rig::{LIMIT, Rig};

/// Inodes of the sockets of a process.
fn sockets(rig: &Rig) -> HashSet<String> {
    let all = fs::read_dir(format!("/proc/{}/fd", rig.process.pid())).unwrap();
    let name = |entry: fs::DirEntry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned());
    let inode = |name: String| Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    all.flatten().filter_map(name).filter_map(inode).collect()
}

/// Inodes that a table of the kernel's has in this column.
fn inodes(rig: &Rig, table: &str, column: usize) -> HashSet<String> {
    let text = fs::read_to_string(format!("/proc/{}/net/{table}", rig.process.pid())).unwrap_or_default();
    text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(column).map(str::to_owned)).collect()
}

#[test]
fn nothing_is_on_a_network() {
    for mut rig in
        [Rig::start("", &["--control=CONTROL"]), Rig::start_net("switch = true\n", &["--control=CONTROL"])]
    {
        let own = sockets(&rig);
        // What is looked for would be found: those of the API and of the control socket are.
        assert!(own.intersection(&inodes(&rig, "unix", 6)).count() >= 2, "{own:?}");
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
            let found: Vec<_> = own.intersection(&inodes(&rig, table, 9)).cloned().collect();
            assert!(found.is_empty(), "{table}: {found:?}");
        }
        rig.end();
    }
}

#[test]
fn what_is_watched_is_printed_again_and_again() {
    let mut rig = Rig::start("", &[]);
    rig.add("a", "backend=null:1M");
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(built("vhostctl").unwrap())
        .args(["--api", &rig.path("api"), "--watch=0.1", "list"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut seen = String::new();
    let mut more = |seen: &mut String| {
        let mut bytes = [0; 4096];
        let n = out.read(&mut bytes).unwrap();
        assert!(n > 0, "it has ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    };
    let screens = |seen: &str| seen.matches("\x1b[H\x1b[2J").count();
    while screens(&seen) < 3 {
        more(&mut seen);
    }
    rig.add("newcomer", "backend=null:1M");
    // What comes later is seen.
    wait::until("the new disk", LIMIT, || {
        more(&mut seen);
        Ok(seen.contains("newcomer").then_some(()))
    })
    .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    rig.end();
}

#[test]
fn shells_complete_every_command() {
    let program = built("vhostctl").expect("cargo build -p vhostctl");
    let complete = |shell: &str| {
        let out = Command::new(&program).args(["completions", shell]).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let help = Command::new(&program).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let is_name = |line: &&str| line.starts_with("  ") && !line.starts_with("   ");
    let commands: Vec<_> = commands
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(is_name)
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    assert!(commands.len() > 20 && commands.contains(&"upgrade"), "{commands:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = complete(shell);
        let missing: Vec<_> = commands.iter().filter(|name| !script.contains(**name)).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?}");
    }
    // And in a shell it does.
    let ask = format!(
        "{}\nCOMP_WORDS=(vhostctl upg); COMP_CWORD=1; _vhostctl vhostctl upg vhostctl; echo \"${{COMPREPLY[@]}}\"",
        complete("bash")
    );
    let out = Command::new("bash").args(["--norc", "-c", &ask]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "upgrade", "{out:?}");
}
