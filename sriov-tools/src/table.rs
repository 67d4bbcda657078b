//! What there is, for people: tables and trees.

use std::fmt::Write;

use comfy_table::{ContentArrangement, Table, presets};

use crate::host::{Facts, on_off};
use crate::pci::class_name;
use crate::state::{Function, Interface, Pf, State, Vf};

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    table
}

fn text(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

fn link(interface: &Interface) -> String {
    match interface.speed {
        Some(speed) => format!("{} {speed}", interface.operstate),
        None => interface.operstate.clone(),
    }
}

fn interfaces(function: &Function) -> String {
    let names: Vec<_> = function.interfaces.iter().map(|i| &*i.name).collect();
    if names.is_empty() { "-".into() } else { names.join(",") }
}

/// A group's number, with who else is in it.
fn group(function: &Function) -> String {
    let Some(group) = &function.iommu_group else { return "-".into() };
    let others = group.members.iter().filter(|m| m.address != function.address).count();
    if others == 0 { group.number.to_string() } else { format!("{}+{others}", group.number) }
}

/// All functions with SR-IOV.
pub fn list(state: &State) -> String {
    let mut table =
        table(&["ADDRESS", "CLASS", "ID", "DRIVER", "NUMA", "GROUP", "VFS", "INTERFACE", "LINK", "ESWITCH"]);
    for pf in &state.pfs {
        let f = &pf.function;
        table.add_row([
            f.address.to_string(),
            class_name(f.class).into(),
            format!("{:04x}:{:04x}", f.vendor, f.device),
            or_dash(f.driver.as_ref()),
            or_dash(f.numa_node),
            group(f),
            format!("{}/{}", pf.vfs.len(), pf.total_vfs),
            interfaces(f),
            or_dash(f.interfaces.first().map(link)),
            or_dash(pf.eswitch),
        ]);
    }
    text(&table)
}

/// One of them, and its VFs.
pub fn show(pf: &Pf, facts: &Facts) -> String {
    let f = &pf.function;
    let mut out = format!("{} {} {:04x}:{:04x}\n", f.address, class_name(f.class), f.vendor, f.device);
    let mut line = |what: &str, value: String| {
        let _ = writeln!(out, "  {what:<12} {value}");
    };
    line("driver", or_dash(f.driver.as_ref()));
    line("VFs", format!("{} of {}", pf.vfs.len(), pf.total_vfs));
    line(
        "new VFs",
        match pf.autoprobe {
            Some(false) => "are not bound by themselves (sriov_drivers_autoprobe 0)".into(),
            _ => "are bound by themselves".into(),
        },
    );
    line("NUMA node", or_dash(f.numa_node));
    line("MSI-X", or_dash(f.msix));
    if let Some(group) = &f.iommu_group {
        let members: Vec<_> = group
            .members
            .iter()
            .map(|m| format!("{} ({})", m.address, m.driver.as_deref().unwrap_or("no driver")))
            .collect();
        line("IOMMU group", format!("{}: {}", group.number, members.join(", ")));
    } else {
        line("IOMMU group", "- (no IOMMU is on)".into());
    }
    for interface in &f.interfaces {
        let mac = or_dash(facts.links.get(&interface.name).and_then(|l| l.mac));
        line("interface", format!("{} {mac} {}", interface.name, link(interface)));
    }
    if let Some(mode) = pf.eswitch {
        line("eswitch", mode.to_string());
    }
    for what in &pf.carries {
        line("carries", what.clone());
    }
    if !pf.vfs.is_empty() {
        let mut table = table(&[
            "VF",
            "ADDRESS",
            "DRIVER",
            "INTERFACE",
            "GROUP",
            "MSI-X",
            "MAC",
            "VLAN",
            "TRUST",
            "SPOOFCHK",
            "LINK",
            "RATE",
            "IN USE",
        ]);
        for vf in &pf.vfs {
            table.add_row(row(vf));
        }
        let _ = write!(out, "\n{}", text(&table));
    }
    out.trim_end().to_owned()
}

fn row(vf: &Vf) -> [String; 13] {
    let (f, s) = (&vf.function, &vf.settings);
    let vlan = s.vlan.map(|vlan| match (vlan, s.qos.unwrap_or(0), s.proto.unwrap_or_default()) {
        (0, ..) => "-".into(),
        (vlan, qos, proto) => format!("{vlan} qos {qos} {proto}"),
    });
    let rate = s.max_rate.map(|max| match (s.min_rate.unwrap_or(0), max) {
        (0, 0) => "-".into(),
        (min, 0) => format!("{min}-"),
        (min, max) => format!("{min}-{max}"),
    });
    let driver = match (&f.driver, &f.driver_override) {
        (Some(driver), Some(only)) if driver == only => format!("{driver}!"),
        (driver, Some(only)) => format!("{} (only {only})", or_dash(driver.as_ref())),
        (driver, None) => or_dash(driver.as_ref()),
    };
    [
        vf.index.to_string(),
        f.address.to_string(),
        driver,
        interfaces(f),
        group(f),
        or_dash(f.msix),
        or_dash(s.mac),
        or_dash(vlan),
        or_dash(s.trust.map(on_off)),
        or_dash(s.spoofchk.map(on_off)),
        or_dash(s.link_state),
        or_dash(rate),
        if f.users.is_empty() { "-".into() } else { f.users.join("; ") },
    ]
}

/// All of it as a tree: functions, their VFs, and who uses them.
pub fn tree(state: &State) -> String {
    let mut out = String::new();
    for pf in &state.pfs {
        let f = &pf.function;
        let driver = f.driver.as_deref().unwrap_or("no driver");
        let _ = writeln!(
            out,
            "{} {} {driver} {} ({} of {} VFs)",
            f.address,
            class_name(f.class),
            interfaces(f),
            pf.vfs.len(),
            pf.total_vfs
        );
        for (n, vf) in pf.vfs.iter().enumerate() {
            let last = n + 1 == pf.vfs.len();
            let f = &vf.function;
            let driver = f.driver.as_deref().unwrap_or("no driver");
            let _ = write!(out, "{} {} {} {driver}", if last { "└─" } else { "├─" }, vf.index, f.address);
            if !f.interfaces.is_empty() {
                let _ = write!(out, " {}", interfaces(f));
            }
            if let Some(mac) = vf.settings.mac.filter(|mac| mac.is_station()) {
                let _ = write!(out, " {mac}");
            }
            let _ = writeln!(out);
            for user in &f.users {
                let _ = writeln!(out, "{}      {user}", if last { "  " } else { "│ " });
            }
        }
    }
    out.trim_end().to_owned()
}
