//! What is asked for, held against itself before anything is opened.

use std::collections::HashMap;

use daemon::file::{Step, Wrong};

use crate::cli::Options;
use crate::device::MAX_PAIRS;
use crate::spec::PortSpec;
use crate::switch::fdb::MAX_PORTS;
use crate::switches::{SwitchSpec, called};

fn wrong(at: &[Step], why: impl Into<String>) -> Wrong {
    Wrong::new(at, why)
}

/// The first thing that is wrong, if anything is.
pub fn check(options: &Options) -> Result<(), Wrong> {
    let ports = options.ports();
    first_port(options)?;
    options.run.check()?;
    switches(options)?;
    joined(options, &ports)?;
    // Those of the list are the last ones.
    let listed = ports.len() - options.port.len();
    for (i, spec) in ports.iter().enumerate() {
        let place = |key: Option<&'static str>| match (i.checked_sub(listed), key) {
            (Some(item), key) => {
                [Step::Key("port"), Step::Item(item)].into_iter().chain(key.map(Step::Key)).collect()
            }
            (None, key) => key.map(Step::Key).into_iter().collect::<Vec<_>>(),
        };
        port(spec, !options.switch.is_empty())
            .and_then(|()| on_a_switch(spec, options))
            .map_err(|(key, why)| wrong(&place(key), format!("port {}: {why}", spec.name())))?;
    }
    distinct(&ports, "port", "ports", listed)?;
    for (i, spec) in options.uplink.iter().enumerate() {
        let at = |key: Option<&'static str>| {
            [Step::Key("uplink"), Step::Item(i)].into_iter().chain(key.map(Step::Key)).collect::<Vec<_>>()
        };
        uplink(spec)
            .and_then(|()| on_a_switch(spec, options))
            .and_then(|()| the_only_uplink(spec, &options.uplink[..i]))
            .and_then(|()| no_port(spec, &ports))
            .map_err(|(key, why)| wrong(&at(key), format!("uplink: {why}")))?;
    }
    distinct(&options.uplink, "uplink", "uplinks", 0)?;
    for name in options.switch.iter().map(|switch| switch.name.as_deref()) {
        let most = MAX_PORTS - usize::from(options.uplink_of(name).is_some());
        let there = ports.iter().filter(|port| !port.has_tap() && port.switch.as_deref() == name).count();
        if there > most {
            return Err(wrong(
                &[Step::Key("port")],
                format!("a switch has at most {most} ports besides its uplink, not {there}"),
            ));
        }
    }
    Ok(())
}

/// Switches, each with a name of its own, of which one need have none.
fn switches(options: &Options) -> Result<(), Wrong> {
    for (i, switch) in options.switch.iter().enumerate() {
        let at = [Step::Key("switch"), Step::Item(i), Step::Key("name")];
        if switch.name.as_deref() == Some("") {
            return Err(wrong(&at, "a switch's name is empty; leave it out, or give it one"));
        }
        if options.switch[..i].iter().any(|other| other.name == switch.name) {
            let why = match &switch.name {
                Some(name) => format!("two switches have the name {name}; give each its own"),
                None => "two switches have no name; give each its own (name=)".into(),
            };
            return Err(wrong(&at, why));
        }
    }
    let has_keys = options.switch.iter().any(|switch| *switch != SwitchSpec::default());
    if options.mac_ageing.is_some() && has_keys {
        let why = "mac-ageing is each switch's own where switches have keys; say it there";
        return Err(wrong(&[Step::Key("mac-ageing")], why));
    }
    Ok(())
}

/// The switch that it names is there.
fn on_a_switch(port: &PortSpec, options: &Options) -> Result<(), PortWrong> {
    let is_uplink = port.place().is_none();
    if port.has_tap() && !is_uplink {
        let why = "a port that is joined to a tap is on no switch; leave switch out, or the tap";
        return port.switch.as_ref().map_or(Ok(()), |_| Err((Some("switch"), why.into())));
    }
    if options.switch.iter().any(|switch| switch.name == port.switch)
        || options.switch.is_empty() && port.switch.is_none()
    {
        return Ok(());
    }
    let names: Vec<_> = options.switch.iter().filter_map(|switch| switch.name.as_deref()).collect();
    let names = names.join(", ");
    Err(match &port.switch {
        Some(name) if options.switch.is_empty() => {
            (Some("switch"), format!("there is no switch {name}; give --switch name={name}"))
        }
        Some(name) if names.is_empty() => {
            (Some("switch"), format!("there is no switch {name}, only one without a name; leave switch out"))
        }
        Some(name) => (Some("switch"), format!("there is no switch {name}; there are {names}")),
        None => (None, format!("switch is missing, as all have names: {names}")),
    })
}

fn the_only_uplink(uplink: &PortSpec, before: &[PortSpec]) -> Result<(), PortWrong> {
    match before.iter().find(|other| other.switch == uplink.switch) {
        Some(other) => {
            let (on, other) = (called(uplink.switch.as_deref()), other.name());
            Err((Some("switch"), format!("{on} has the uplink {other} already; a switch has one at most")))
        }
        None => Ok(()),
    }
}

/// Counters and limits are found by name, of ports and uplinks alike.
fn no_port(uplink: &PortSpec, ports: &[PortSpec]) -> Result<(), PortWrong> {
    let name = uplink.name();
    if ports.iter().all(|port| port.name() != name) {
        return Ok(());
    }
    Err((Some("name"), format!("a port has the name {name} as well; give one of them another (name=)")))
}

fn first_port(options: &Options) -> Result<(), Wrong> {
    match options {
        Options { socket_path: None, fd: None, tap: Some(_), .. } => {
            Err(wrong(&[Step::Key("tap")], "a tap needs a port: give --socket-path (see --help)"))
        }
        Options { socket_path: None, fd: None, tap_fds, .. } if !tap_fds.is_empty() => {
            Err(wrong(&[Step::Key("tap-fds")], "a tap needs a port: give --socket-path (see --help)"))
        }
        Options { socket_path: None, fd: None, mac: Some(_), .. } => {
            Err(wrong(&[Step::Key("mac")], "mac is that of the port of --socket-path; write mac= for others"))
        }
        _ => Ok(()),
    }
}

/// How the ports are joined.
fn joined(options: &Options, ports: &[PortSpec]) -> Result<(), Wrong> {
    let hub = ports.iter().filter(|port| !port.has_tap()).count();
    let ways = [
        ("switch", !options.switch.is_empty()),
        ("wire", options.wire),
        ("loopback", options.loopback.is_some()),
    ];
    let chosen: Vec<_> = ways.iter().filter(|(_, chosen)| *chosen).map(|(way, _)| *way).collect();
    // With the API, they may come later.
    if ports.is_empty() && options.http.api.is_none() {
        return Err(wrong(&[], "nothing to serve; give --socket-path or --port (see --help)"));
    }
    match chosen.as_slice() {
        [_, second, ..] => {
            let why = format!("ports are joined in one way; choose one of {}", chosen.join(", "));
            return Err(wrong(&[Step::Key(second)], why));
        }
        [] if hub > 0 => {
            return Err(wrong(
                &[],
                "nothing to join the ports to; give --switch, --wire, --loopback or --tap (see --help)",
            ));
        }
        ["wire"] if hub > 2 || hub < 2 && options.http.api.is_none() => {
            let why = format!(
                "a wire has two ends, and there are {hub} ports; name two with --socket-path and --port"
            );
            return Err(wrong(&[Step::Key("wire")], why));
        }
        _ => {}
    }
    if !options.uplink.is_empty() && options.switch.is_empty() {
        return Err(wrong(&[Step::Key("uplink")], "an uplink goes with a switch; give --switch"));
    }
    for (key, is_there) in
        [("pcap-snaplen", options.pcap_snaplen.is_some()), ("pcap-filter", options.pcap_filter.is_some())]
    {
        if is_there && options.pcap.is_none() {
            return Err(wrong(&[Step::Key(key)], format!("{key} goes with pcap, the file to capture to")));
        }
    }
    Ok(())
}

type PortWrong = (Option<&'static str>, String);

fn port(port: &PortSpec, switch: bool) -> Result<(), PortWrong> {
    let fail = |key: &'static str, why: &str| Err((Some(key), why.to_owned()));
    match (&port.socket_path, port.fd) {
        (Some(path), None) if path.as_os_str().is_empty() => {
            return fail("socket-path", "socket-path is empty");
        }
        (Some(_), Some(_)) => return fail("fd", "socket-path and fd exclude each other"),
        (None, None) => return Err((None, "socket-path is missing".into())),
        _ => {}
    }
    if port.tap.is_some() && !port.tap_fds.is_empty() {
        return fail("tap-fds", "tap and tap-fds exclude each other");
    }
    if port.tap_fds.len() > usize::from(MAX_PAIRS) {
        let why = format!(
            "a card has at most {MAX_PAIRS} pairs of queues, and there are {} descriptors; pass fewer",
            port.tap_fds.len()
        );
        return fail("tap-fds", &why);
    }
    for (key, is_there) in [
        ("af-packet", port.af_packet.is_some()),
        ("af-xdp", port.af_xdp.is_some()),
        ("queue", port.queue.is_some()),
    ] {
        if is_there {
            return fail(key, &format!("{key} is for the uplink"));
        }
    }
    if port.has_rules() && (!switch || port.has_tap()) {
        return Err((None, "rules for its packets need --switch, and no tap of its own".into()));
    }
    if port.guard && port.mac.is_none() {
        return fail("guard", "guard=on needs its mac=");
    }
    vlans(port)
}

fn vlans(port: &PortSpec) -> Result<(), PortWrong> {
    match port {
        PortSpec { vlan: Some(_), trunk: Some(_), .. } => {
            Err((Some("trunk"), "vlan and trunk exclude each other".into()))
        }
        PortSpec { trunk: None, native: Some(_), .. } => {
            Err((Some("native"), "native goes with trunk".into()))
        }
        _ => Ok(()),
    }
}

/// No two ports, or uplinks, have a name, a socket or a tap together. The first ones may not be of the list.
fn distinct(ports: &[PortSpec], list: &'static str, those: &str, unlisted: usize) -> Result<(), Wrong> {
    type Named = fn(&PortSpec) -> Option<String>;
    let what: [(&str, &'static str, Named); 3] = [
        ("the socket", "socket-path", |port| port.place().map(|place| place.key())),
        ("the tap", "tap", |port| port.tap.clone()),
        ("the name", "name", |port| Some(port.name())),
    ];
    for (what, key, of) in what {
        let mut seen = HashMap::new();
        for (i, port) in ports.iter().enumerate() {
            let Some(is) = of(port) else { continue };
            if seen.insert(is.clone(), i).is_some() {
                let at = [Step::Key(list), Step::Item(i.saturating_sub(unlisted)), Step::Key(key)];
                return Err(wrong(&at, format!("two {those} have {what} {is}; give each its own")));
            }
        }
    }
    Ok(())
}

fn uplink(port: &PortSpec) -> Result<(), PortWrong> {
    let fail = |key: &'static str, why: &str| Err((Some(key), why.to_owned()));
    let ways = [("tap", &port.tap), ("af-packet", &port.af_packet), ("af-xdp", &port.af_xdp)];
    let mut ways = ways.into_iter().filter(|(_, name)| name.is_some());
    if ways.next().is_none() {
        return Err((None, "tap, af-packet or af-xdp is missing".into()));
    }
    if let Some((key, _)) = ways.next() {
        return fail(key, "one interface is enough: tap, af-packet or af-xdp");
    }
    if port.interface() == Some("") {
        return Err((None, "the interface has no name".into()));
    }
    if port.queue.is_some() && port.af_xdp.is_none() {
        return fail("queue", "queue goes with af-xdp");
    }
    let guests = [
        ("socket-path", port.socket_path.is_some()),
        ("fd", port.fd.is_some()),
        ("mac", port.mac.is_some()),
        ("mtu", port.mtu.is_some()),
        ("wait", port.wait),
        ("tap-fds", !port.tap_fds.is_empty()),
        ("guard", port.guard),
        ("ip", !port.ip.is_empty()),
        ("router", port.router),
    ];
    if let Some((key, _)) = guests.iter().find(|(_, is_there)| *is_there) {
        return fail(key, &format!("{key} is for ports of guests"));
    }
    vlans(port)
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
            "x --socket-path=/s --tap=t",
            "x --fd=3 --tap-fds=4,5",
            "x --socket-path=/s --loopback=echo",
            "x --wire --port=socket-path=/a --port=socket-path=/b",
            "x --wire --socket-path=/a --mac=52:54:00:00:00:01 --port=socket-path=/b",
            "x --switch --port=socket-path=/a,guard,mac=52:54:00:00:00:01,trunk=5,native=6",
            "x --switch --port=socket-path=/a --uplink=af-packet=e,trunk=5+6,rx-bps=1G",
            "x --switch --port=socket-path=/a --uplink=af-xdp=e,queue=3",
            "x --switch --port=socket-path=/a --uplink=tap=t,trunk=5",
            "x --fd=3 --tap-fds=4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19",
            "x --socket-path=/s --tap=t --pcap=/p --pcap-snaplen=96",
            "x --switch --port=socket-path=/a,vlan=5 --port=socket-path=/b,tap=t",
            "x --switch --mac-ageing=9 --socket-path=/a",
            "x --switch --switch name=b,mac-ageing=9 --socket-path=/a --port=socket-path=/b,switch=b",
            "x --switch name=a --port=socket-path=/a,switch=a --port=socket-path=/t,tap=t",
            "x --switch --switch name=b --socket-path=/a --uplink=tap=t --uplink=tap=u,switch=b,vlan=5",
            "x --switch --switch name=b --socket-path=/a --uplink=af-xdp=e --uplink=af-xdp=e,queue=1,name=f,switch=b",
        ] {
            assert_eq!(said(args), Ok(()), "{args}");
        }
    }

    #[test]
    fn what_does_not_is_said_with_its_place() {
        let [port, item] = [Step::Key("port"), Step::Item(0)];
        let of = |key| vec![port, item, Step::Key(key)];
        let top = |key| vec![Step::Key(key)];
        let uplink = |item| vec![Step::Key("uplink"), Step::Item(item)];
        let up_of = |item, key| vec![Step::Key("uplink"), Step::Item(item), Step::Key(key)];
        let up = |key| up_of(0, key);
        let switch = |item| vec![Step::Key("switch"), Step::Item(item), Step::Key("name")];
        for (args, at) in [
            ("x", vec![]),
            ("x --switch", vec![]),
            ("x --tap=t", top("tap")),
            ("x --tap-fds=3", top("tap-fds")),
            ("x --port=socket-path=/a --switch --mac=52:54:00:00:00:01", top("mac")),
            ("x --port=socket-path=/a", vec![]),
            ("x --port=socket-path=/a --wire", top("wire")),
            ("x --port=socket-path=/a --switch --wire", top("wire")),
            ("x --port=socket-path=/a --switch --loopback=echo", top("loopback")),
            ("x --port=socket-path=/a --wire --uplink=af-packet=e --port=socket-path=/b", top("uplink")),
            ("x --port=socket-path=/a --switch --pcap-snaplen=99", top("pcap-snaplen")),
            ("x --port=socket-path=/a --switch --pcap-filter=arp", top("pcap-filter")),
            ("x --switch --port=name=a", vec![port, item]),
            ("x --switch --port=socket-path=", of("socket-path")),
            ("x --switch --port=socket-path=/a,fd=3", of("fd")),
            ("x --socket-path=/a --fd=3 --loopback=echo", top("fd")),
            ("x --switch --port=socket-path=/a,tap=t,tap-fds=3", of("tap-fds")),
            ("x --switch --port=socket-path=/a,af-xdp=e", of("af-xdp")),
            ("x --switch --port=socket-path=/a,tap=t,vlan=5", vec![port, item]),
            ("x --loopback=echo --port=socket-path=/a,vlan=5", vec![port, item]),
            ("x --switch --port=socket-path=/a,guard", of("guard")),
            ("x --switch --port=socket-path=/a,vlan=5,trunk=6", of("trunk")),
            ("x --switch --port=socket-path=/a,vlan=5,native=6", of("native")),
            ("x --switch --socket-path=/a --port=socket-path=/a", of("socket-path")),
            ("x --switch --socket-path=/a --port=socket-path=/b,name=/a", of("name")),
            ("x --socket-path=/a --tap=t --port=socket-path=/b,tap=t", of("tap")),
            ("x --switch --port=socket-path=/a --uplink=vlan=5", uplink(0)),
            ("x --switch --port=socket-path=/a --uplink=af-packet=", uplink(0)),
            ("x --switch --port=socket-path=/a --uplink=af-packet=e,af-xdp=f", up("af-xdp")),
            ("x --switch --port=socket-path=/a --uplink=tap=e,af-packet=f", up("af-packet")),
            ("x --switch --port=socket-path=/a --uplink=tap=e,queue=0", up("queue")),
            ("x --switch --port=socket-path=/a --uplink=tap=", uplink(0)),
            (
                "x --switch --port=socket-path=/a,tap-fds=4+5+6+7+8+9+10+11+12+13+14+15+16+17+18+19+20",
                of("tap-fds"),
            ),
            ("x --switch --port=socket-path=/a --uplink=af-packet=e,queue=1", up("queue")),
            ("x --switch --port=socket-path=/a --uplink=af-packet=e,guard", up("guard")),
            ("x --switch --port=socket-path=/a --uplink=af-packet=e,mtu=1500", up("mtu")),
            ("x --switch --port=socket-path=/a --uplink=af-packet=e,native=1", up("native")),
            ("x --switch --switch --socket-path=/a", switch(1)),
            ("x --switch name=a --switch name=a --port=socket-path=/a,switch=a", switch(1)),
            ("x --switch name= --port=socket-path=/a", switch(0)),
            ("x --switch name=a --switch name=b --port=socket-path=/a,switch=c", of("switch")),
            ("x --switch --port=socket-path=/a,switch=c", of("switch")),
            ("x --loopback=echo --port=socket-path=/a,switch=c", of("switch")),
            ("x --switch name=a --port=socket-path=/a", vec![port, item]),
            ("x --switch name=a --socket-path=/a", vec![]),
            ("x --switch name=a --port=socket-path=/a,switch=a,tap=t", of("switch")),
            ("x --switch name=a --mac-ageing=9 --port=socket-path=/a,switch=a", top("mac-ageing")),
            ("x --switch mac-ageing=7 --mac-ageing=9 --socket-path=/a", top("mac-ageing")),
            ("x --switch name=a --switch --socket-path=/a --uplink=tap=t,switch=b", up("switch")),
            ("x --switch name=a --port=socket-path=/a,switch=a --uplink=tap=t", uplink(0)),
            ("x --switch --socket-path=/a --uplink=tap=t --uplink=tap=u", up_of(1, "switch")),
            (
                "x --switch --switch name=b --socket-path=/a --uplink=af-xdp=e --uplink=af-xdp=e,queue=1,switch=b",
                up_of(1, "name"),
            ),
        ] {
            assert_eq!(said(args).map_err(|e| e.at), Err(at), "{args}");
        }
    }
}
