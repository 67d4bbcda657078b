//! A file that was read again: what of it can be done while guests run, and what has to wait.

use crate::check::check;
use crate::cli::Options;
use crate::spec::PortSpec;

/// What a file asks for now.
#[derive(Debug)]
pub struct Reload {
    /// What holds from now on: what was asked for, as far as it can be done.
    pub options: Options,
    /// What cannot be done, one line each.
    pub refused: Vec<String>,
}

/// Names those of some fields that differ, as a file has them.
macro_rules! differing {
    ($a:expr, $b:expr, $($field:ident)*) => {
        [$((stringify!($field).replace('_', "-"), $a.$field != $b.$field)),*]
            .into_iter()
            .filter_map(|(name, differs)| differs.then_some(name))
    };
}

/// What `wanted` asks for of a daemon that does `now`. An error leaves all as it is.
pub fn reload(now: &Options, wanted: &Options) -> Result<Reload, String> {
    let mut refused: Vec<String> = differing!(
        now, wanted,
        socket_path fd tap tap_fds pcap pcap_snaplen pcap_filter loopback wire switch mac_ageing mac mtu num_queue_pairs
        queue_size packed record_core_cycles
    )
    .chain(differing!(now.run, wanted.run, cpus housekeeping guest_cpus poll log))
    .chain(differing!(now.http, wanted.http, api api_mode allow))
    .chain(differing!(now.process.upgrade, wanted.process.upgrade, control))
    .chain(differing!(now.process.confine, wanted.process.confine, sandbox user))
    .map(|key| format!("{key} cannot change while it runs"))
    .collect();
    let mut options = now.clone();
    for port in &mut options.port {
        match wanted.port.iter().find(|p| p.place() == port.place()) {
            Some(new) => *port = changed(port, new, &mut refused),
            None => refused.push(format!("port {}: it cannot go while it runs", port.name())),
        }
    }
    for new in wanted.port.iter().filter(|new| now.port.iter().all(|p| p.place() != new.place())) {
        refused.push(format!("port {}: it cannot come while it runs", new.name()));
    }
    for uplink in &mut options.uplink {
        match wanted.uplink_of(uplink.switch.as_deref()) {
            Some(new) => *uplink = changed(uplink, new, &mut refused),
            None => refused.push(format!("uplink {}: it cannot go while it runs", uplink.name())),
        }
    }
    for new in wanted.uplink.iter().filter(|new| now.uplink_of(new.switch.as_deref()).is_none()) {
        refused.push(format!("uplink {}: it cannot come while it runs", new.name()));
    }
    check(&options).map_err(|e| format!("with what cannot change while it runs: {e}"))?;
    Ok(Reload { options, refused })
}

/// A port as it is, with what can change of it.
fn changed(port: &PortSpec, new: &PortSpec, refused: &mut Vec<String>) -> PortSpec {
    let keys = differing!(port, new, name switch mac mtu wait tap tap_fds af_packet af_xdp queue);
    refused.extend(keys.map(|key| format!("port {}: {key} cannot change while it runs", port.name())));
    let PortSpec { socket_path, fd, name, switch, mac, mtu, wait, tap, tap_fds, .. } = port.clone();
    let kept = PortSpec { socket_path, fd, name, switch, mac, mtu, wait, tap, tap_fds, ..new.clone() };
    let PortSpec { af_packet, af_xdp, queue, .. } = port.clone();
    PortSpec { af_packet, af_xdp, queue, ..kept }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "switch = true\n\
        [uplink]\naf-packet = 'e'\n\
        [[port]]\nsocket-path = '/a'\nname = 'a'\nmac = '52:54:00:00:00:01'\n\
        [[port]]\nsocket-path = '/b'\nvlan = 5\n";

    fn after(change: impl FnOnce(&str) -> String) -> Result<Reload, String> {
        let read = |text: &str| toml::from_str(text).unwrap();
        reload(&read(NOW), &read(&change(NOW)))
    }

    #[test]
    fn what_can_change_does() {
        let text = |now: &str| {
            now.replace("'e'", "'e'\nvlan = 7")
                .replace("name = 'a'", "name = 'a'\nlink = 'down'\nguard = true\ntx-bps = '1M'")
        };
        let Reload { options, refused } = after(text).unwrap();
        assert_eq!(refused, [""; 0]);
        assert_eq!(options.uplink[0].vlan, Some(7));
        assert!(options.port[0].link_down && options.port[0].guard);
        assert_eq!((options.port[0].tx_bps, options.port[1].vlan), (Some(1_000_000), Some(5)));
    }

    #[test]
    fn what_cannot_is_refused_by_name_and_the_rest_is_done() {
        let text = |now: &str| {
            let now = now.replace("switch = true", "switch = true\nnum-queue-pairs = 2");
            now.replace("name = 'a'", "name = 'c'\nmtu = 9000\nlink = 'down'")
                .replace("'/b'", "'/c'")
                .replace("'e'", "'f'")
        };
        let Reload { options, refused } = after(text).unwrap();
        assert_eq!(
            refused,
            [
                "num-queue-pairs cannot change while it runs",
                "port a: name cannot change while it runs",
                "port a: mtu cannot change while it runs",
                "port /b: it cannot go while it runs",
                "port /c: it cannot come while it runs",
                "port e: af-packet cannot change while it runs",
            ]
        );
        assert!(options.port[0].link_down);
        assert_eq!(
            (options.port[0].name(), options.port[0].mtu, options.num_queue_pairs),
            ("a".into(), None, 1)
        );
        assert_eq!((options.port.len(), options.uplink[0].name()), (2, "e".into()));
    }

    #[test]
    fn a_guard_without_the_address_that_it_would_have_leaves_all_as_it_is() {
        let refused = after(|now| now.replace("vlan = 5", "guard = true\nmac = '52:54:00:00:00:02'"));
        assert!(refused.unwrap_err().contains("port /b: guard=on needs its mac="));
    }
}
