//! What has changed while a daemon runs, written into its file ([`control::saved`]).

use std::path::Path;

use anyhow::{Context, Result, bail};
use control::saved::{self, Listed, Reactors, set};
use daemon::file::File;
use daemon::running::RunOptions;
use toml_edit::{Array, DocumentMut, Item, RawString, Table, TableLike, Value, value};

use crate::cli::Options;
use crate::mac::MacAddr;
use crate::spec::{LIMITS, PortSpec};
use crate::switches::SwitchSpec;

/// Brings the file at `path` up to date with what holds now, and says what that is.
pub fn saved(path: &Path, now: &Options, reactors: &Reactors) -> Result<Options> {
    let text = saved::read(path)?;
    let (text, RunOptions { cpus, poll, .. }) = updated(path, &text, now, reactors)?;
    saved::replace(path, &text)?;
    // What else the file says may be for the next start.
    Ok(Options { run: RunOptions { cpus, poll, ..now.run.clone() }, ..now.clone() })
}

fn updated(path: &Path, text: &str, now: &Options, reactors: &Reactors) -> Result<(String, RunOptions)> {
    let was = Options::of(&File::new(path, text.to_owned())).context("it has changed since the start")?;
    let mut document: DocumentMut = text.parse()?;
    let run = reactors.update(&mut document, &was.run);
    update_switches(&mut document, &was, now).with_context(|| path.display().to_string())?;
    let old = was.ports();
    let has_first = old.len() > was.port.len();
    saved::update(&mut document, &old, has_first, &now.ports())
        .with_context(|| path.display().to_string())?;
    for (i, (old, new)) in was.uplink.iter().zip(&now.uplink).enumerate() {
        let table: Option<&mut dyn TableLike> = match document.get_mut("uplink") {
            Some(Item::ArrayOfTables(tables)) => tables.get_mut(i).map(|table| table as _),
            Some(Item::Value(Value::Array(tables))) => {
                tables.get_mut(i).and_then(Value::as_inline_table_mut).map(|table| table as _)
            }
            one => one.and_then(Item::as_table_like_mut),
        };
        if let Some(table) = table {
            update_limits(old, new, table);
        }
    }
    let text = document.to_string();
    let read = Options::of(&File::new(path, text.clone())).context("what would be saved is wrong")?;
    let sorted = |options: &Options| {
        let mut ports = options.ports();
        ports.sort_by_key(PortSpec::name);
        ports
    };
    if sorted(&read) != sorted(now) || read.uplink != now.uplink || read.switch != now.switch {
        bail!("what would be saved are other ports or switches; please report this");
    }
    Ok((text, run))
}

/// Has a table that says what `old` is limited to say that of `new`.
fn update_limits(old: &PortSpec, new: &PortSpec, table: &mut dyn TableLike) {
    for ((key, old), new) in LIMITS.iter().zip(old.limits().all()).zip(new.limits().all()) {
        match new {
            _ if old == new => {}
            Some(n) => drop(table.insert(key, value(number(n)))),
            None => drop(table.remove(key)),
        }
    }
}

/// Brings switches up to date. One without any keys may stand there as `true`, which no list has room for.
fn update_switches(document: &mut DocumentMut, was: &Options, now: &Options) -> Result<()> {
    if was.switch == now.switch {
        return Ok(());
    }
    let mut above = String::new();
    // It is each switch's own now.
    if now.mac_ageing.is_none() {
        above += &take_out(document, "mac-ageing");
    }
    if document.get("switch").is_some_and(|item| item.is_bool() || item.is_table_like()) {
        let mut one = Table::new();
        for (key, written) in was.switch.iter().flat_map(Listed::written) {
            one.insert(key, value(written));
        }
        above.insert_str(0, &take_out(document, "switch"));
        one.decor_mut().set_prefix(format!("\n{}", above.trim_start()));
        document.insert("switch", Item::ArrayOfTables([one].into_iter().collect()));
    }
    saved::update(document, &was.switch, false, &now.switch)
}

/// Takes a key out: the comment that stood above it.
fn take_out(document: &mut DocumentMut, key: &str) -> String {
    let Some((key, item)) = document.remove_entry(key) else { return String::new() };
    let decor = item.as_table().map_or(key.leaf_decor(), Table::decor);
    decor.prefix().and_then(RawString::as_str).unwrap_or_default().to_owned()
}

impl Listed for SwitchSpec {
    const LIST: &'static str = "switch";
    const FIRST: &'static [&'static str] = &[];

    fn place(&self) -> Option<String> {
        self.name.clone()
    }

    fn written(&self) -> Vec<(&'static str, Value)> {
        let ageing = self.mac_ageing.map(|n| i64::from(n).into());
        let all = [("name", self.name.clone().map(Value::from)), ("mac-ageing", ageing)];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }

    fn update(&self, old: &SwitchSpec, table: &mut Table, _: bool) -> bool {
        if self.mac_ageing != old.mac_ageing {
            set(table, "mac-ageing", self.mac_ageing.map(|n| i64::from(n).into()));
        }
        true
    }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn texts(all: impl Iterator<Item = String>) -> Value {
    all.collect::<Array>().into()
}

impl Listed for PortSpec {
    const LIST: &'static str = "port";
    const FIRST: &'static [&'static str] = &["socket-path", "fd", "tap", "tap-fds", "mac"];

    fn place(&self) -> Option<String> {
        PortSpec::place(self).map(|place| place.key())
    }

    fn written(&self) -> Vec<(&'static str, Value)> {
        let text = |value: &Option<String>| value.clone().map(Value::from);
        let n = |value: Option<u64>| value.map(|n| Value::from(number(n)));
        let on = |value: bool| value.then(|| Value::from(true));
        let path = self.socket_path.as_ref().map(|path| Value::from(path.display().to_string()));
        let mac = self.mac.map(|mac| Value::from(MacAddr(mac).to_string()));
        let fds: Array = self.tap_fds.iter().map(|fd| i64::from(*fd)).collect();
        let own = [
            ("name", text(&self.name)),
            ("switch", text(&self.switch)),
            ("socket-path", path),
            ("fd", self.fd.map(|fd| Value::from(i64::from(fd)))),
            ("mac", mac),
            ("mtu", n(self.mtu.map(Into::into))),
            ("wait", on(self.wait)),
            ("link", self.link_down.then(|| Value::from("down"))),
            ("tap", text(&self.tap)),
            ("tap-fds", (!fds.is_empty()).then(|| fds.into())),
            ("vlan", n(self.vlan.map(Into::into))),
            ("trunk", self.trunk.as_ref().map(|set| Value::from(set.to_string()))),
            ("native", n(self.native.map(Into::into))),
            ("guard", on(self.guard)),
            ("ip", (!self.ip.is_empty()).then(|| texts(self.ip.iter().map(ToString::to_string)))),
            ("router", on(self.router)),
            ("isolated", on(self.isolated)),
            ("flood-unknown", self.flood_unknown.map(Value::from)),
            ("max-macs", n(self.max_macs)),
        ];
        let limits = LIMITS.iter().copied().zip(self.limits().all().map(n));
        own.into_iter().chain(limits).filter_map(|(key, value)| Some((key, value?))).collect()
    }

    fn update(&self, old: &PortSpec, table: &mut Table, is_first: bool) -> bool {
        let same = self.link_down == old.link_down && self.limits() == old.limits();
        if is_first || same {
            return same;
        }
        if self.link_down != old.link_down {
            set(table, "link", self.link_down.then(|| "down".into()));
        }
        update_limits(old, self, table);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use poll_engine::engine::placement::CpuList;
    use poll_engine::engine::placement::auto::Cpus;

    const FILE: &str = "# Ours.\nswitch = true\nmtu = 1400\napi = '/api'\n\n[uplink]\naf-packet = 'e' # out\n\n\
        # The first.\n[[port]]\nname = 'a'\nsocket-path = '/a'\ntx-bps = '1M'\n\n\
        [[port]]\nsocket-path = '/b' # gone at the end\n";

    fn read(text: &str) -> Options {
        Options::of(&File::new(Path::new("f"), text.to_owned())).unwrap()
    }

    fn after(text: &str, change: impl FnOnce(&mut Options)) -> (String, Options) {
        let mut now = read(text);
        change(&mut now);
        let cpus = match &now.run.cpus {
            Some(Cpus::These(list)) => Some(list.0.clone()),
            _ => None,
        };
        let reactors = Reactors::new(now.run.poll, cpus, Vec::new());
        let (text, run) = updated(Path::new("f"), text, &now, &reactors).unwrap();
        let read = read(&text);
        assert_eq!(run, read.run);
        (text, read)
    }

    #[test]
    fn what_has_not_changed_stays_as_it_was_written() {
        assert_eq!(after(FILE, |_| {}).0, FILE);
    }

    #[test]
    fn what_a_file_says_for_the_next_start_does_not_hold_yet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net.toml");
        std::fs::write(&path, format!("log = 'debug'\n{FILE}")).unwrap();
        let now = read(FILE);
        let saved = saved(&path, &now, &Reactors::new(now.run.poll, None, Vec::new())).unwrap();
        assert_eq!(saved.run, now.run);
    }

    #[test]
    fn ports_come_and_go_and_comments_stay() {
        let all = "name=c,socket-path=/c,mac=52:54:00:00:00:01,mtu=1500,wait,link=down,trunk=5+10-19,native=7,guard,\
                   ip=10.0.0.1,ip=fd00::/64,router,isolated,flood-unknown=off,max-macs=7,tx-bps=1M,tx-pps=2,rx-bps=3,\
                   rx-pps=4,burst-ms=5,broadcast-pps=6,multicast-pps=7,unknown-pps=8";
        let (text, read) = after(FILE, |now| {
            now.run.poll = poll_engine::engine::pacing::Pacing::Busy;
            now.run.cpus = Some(Cpus::These(CpuList(vec![0, 3])));
            now.port.remove(1);
            now.port[0].link_down = true;
            now.port[0].tx_bps = None;
            now.port[0].rx_pps = Some(5);
            now.port.push(all.parse().unwrap());
            now.uplink[0].tx_pps = Some(9);
        });
        assert_eq!((read.port.len(), read.port[0].name(), read.port[0].rx_pps), (2, "a".into(), Some(5)));
        assert_eq!(read.port[1], all.parse().unwrap());
        assert_eq!(read.run.cpus, Some(Cpus::These(CpuList(vec![0, 3]))));
        assert_eq!(read.uplink[0].tx_pps, Some(9));
        assert!(
            text.contains("# Ours.") && text.contains("# The first.") && text.contains("# out"),
            "{text}"
        );
        assert!(!text.contains("gone") && text.contains("poll = \"busy\""), "{text}");
        let (text, read) = after(&text, |now| now.port.clear());
        assert!(read.port.is_empty() && !text.contains("[[port]]"), "{text}");
    }

    #[test]
    fn switches_come_and_go() {
        let switch = |text: &str| text.parse::<SwitchSpec>().unwrap();
        for file in [
            "# Ours.\nswitch = true\nmac-ageing = 7 # short\napi = '/api'\n",
            "# Ours.\napi = '/api'\n[switch]\nmac-ageing = 7\n[[uplink]]\ntap = 't' # out\n",
            "# Ours.\napi = '/api'\n[[switch]]\nmac-ageing = 7\n[uplink]\ntap = 't'\n",
            "# Ours.\napi = '/api'\nuplink = [{ tap = 't' }]\nswitch = { mac-ageing = 7 }\n",
        ] {
            assert_eq!(after(file, |_| {}).0, file);
            let (text, read) = after(file, |now| {
                now.add_switch(switch("name=b,mac-ageing=9"));
                now.port.push("socket-path=/b,switch=b".parse().unwrap());
                now.uplink.iter_mut().for_each(|uplink| uplink.tx_pps = Some(5));
            });
            assert_eq!(read.switch, [switch("mac-ageing=7"), switch("name=b,mac-ageing=9")], "{text}");
            assert_eq!(read.port[0].switch.as_deref(), Some("b"));
            assert!(read.uplink.iter().all(|uplink| uplink.tx_pps == Some(5)), "{text}");
            assert!(
                text.contains("# Ours.") && (text.contains("# out") || !file.contains("# out")),
                "{text}"
            );
            let (text, read) = after(&text, |now| {
                now.port.clear();
                now.switch.remove(1);
            });
            assert_eq!(read.switch, [switch("mac-ageing=7")], "{text}");
        }
    }

    #[test]
    fn a_first_port_of_options_of_its_own_has_a_table_when_it_has_to() {
        let file = "api = '/api'\nswitch = true\nsocket-path = '/a'\nmac = '52:54:00:00:00:01'\n";
        assert_eq!(after(file, |_| {}).0, file);
        let (text, read) = after(file, |now| {
            let mut port = now.ports().remove(0);
            port.tx_bps = Some(5);
            now.set_port(&port);
        });
        assert_eq!((read.socket_path, read.port.len(), read.port[0].tx_bps), (None, 1, Some(5)), "{text}");
        assert_eq!(read.port[0].mac, Some([0x52, 0x54, 0, 0, 0, 1]));
        let (_, read) = after(file, |now| now.drop_port(&daemon::Place::Path("/a".into())));
        assert!(read.ports().is_empty());
    }
}
