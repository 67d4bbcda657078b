//! The daemon and its file: what is wrong is said before anything is opened.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vhost_net::cli::Options;
use vhost_net::switch::vlan::Vlan;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-net")).args(args).output().unwrap()
}

/// A file with this in it.
fn file(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("net.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn the_example_in_the_documentation_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vhost-net.toml");
    let options = Options::read(&path).unwrap();
    let ports = options.ports();
    let names: Vec<String> = ports.iter().map(vhost_net::spec::PortSpec::name).collect();
    assert_eq!(names, ["web", "router", "spare"]);
    assert_eq!(ports[0].rules().ingress.bits, Some(100_000_000));
    assert_eq!(ports[0].rules().vlan, Vlan::Access(10));
    assert!(matches!(ports[1].rules().vlan, Vlan::Trunk { native: Some(5), .. }));
    assert!(ports[2].link_down && options.uplink.is_some());
    let out = run(&["--check", "--config", path.to_str().unwrap()]);
    assert!(out.status.success(), "{out:?}");
}

#[test]
fn mistakes_are_one_line_with_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    for (text, said) in [
        ("switch = true\n[[port]]\nsocket-path = 'SOCK'\nvlan = 4095\n", ":4: vlan: '4095' is no VLAN"),
        ("switch = true\n[[port]]\nsocket-path = 'SOCK'\nvlans = 5\n", ":4: unknown field `vlans`"),
        (
            "switch = true\n\n[[port]]\nsocket-path = 'SOCK'\nguard = true\n",
            ":5: port SOCK: guard=on needs its mac=",
        ),
        ("switch = true\nwire = true\n[[port]]\nsocket-path = 'SOCK'\n", ":2: ports are joined in one way"),
        ("switch = yes\n", ":1: "),
        ("switch = true\n", ": nothing to serve"),
    ] {
        let socket = dir.path().join("port.sock");
        let text = text.replace("SOCK", socket.to_str().unwrap());
        let path = file(dir.path(), &text);
        let said = format!("vhost-net: {}{}", path.display(), said.replace("SOCK", socket.to_str().unwrap()));
        for args in [&["--config"][..], &["--check", "--config"]] {
            let out = run(&[args, &[path.to_str().unwrap()]].concat());
            let stderr = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(1), "{text}: {stderr}");
            assert!(
                stderr.starts_with(&said) && stderr.lines().count() == 1,
                "{text}: {stderr} is not {said}"
            );
        }
        assert!(!socket.exists(), "nothing was opened");
    }
    let missing = run(&["--config", "/nonexistent/net.toml"]);
    assert!(
        String::from_utf8(missing.stderr)
            .unwrap()
            .contains("cannot read /nonexistent/net.toml: No such file")
    );
}

#[test]
fn capabilities_are_what_the_discovery_file_promises() {
    let out = run(&["--print-capabilities"]);
    assert!(out.status.success());
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(said.trim(), r#"{"features":[],"type":"net"}"#);
    let file = include_str!("../50-kickless-vhost-net.json");
    for part in [r#""type": "net""#, r#""binary": "/usr/bin/vhost-net""#, r#""description": ""#] {
        assert!(file.contains(part), "{part}");
    }
}
