//! `sriov`: virtual functions set up, described and handed out.

use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use daemon::file::File;
use daemon::print;
use sriov_tools::apply::Applier;
use sriov_tools::cli::{Cli, Command, How, Mdev, wanted_vf};
use sriov_tools::file::{Wanted, WantedMdev, WantedPf, WantedVf};
use sriov_tools::host::dir::{DirHost, record};
use sriov_tools::host::real::{RealHost, write_file};
use sriov_tools::host::{Facts, Host};
use sriov_tools::pci::PciAddr;
use sriov_tools::plan::{self, Plan};
use sriov_tools::state::{self, Pf, State, Vf};
use sriov_tools::{export, table};

fn main() -> ExitCode {
    // In our place: its exit code is the kernel's answer.
    if let Ok(Cli { command: Command::WriteFile { file, text }, .. }) = clap::Parser::try_parse() {
        return ExitCode::from(write_file(&file, &text) as u8);
    }
    daemon::main(run)
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::List { json, tree } => {
            let (state, _) = read(cli)?;
            print(&if *json {
                to_json(&state)?
            } else if *tree {
                table::tree(&state)
            } else {
                table::list(&state)
            });
            Ok(())
        }
        Command::Show { pf, json } => {
            let (state, facts) = read(cli)?;
            let pf = find_pf(&state, pf)?;
            print(&if *json { to_json(pf)? } else { table::show(pf, &facts) });
            Ok(())
        }
        Command::Create { pf, n, unbound, how } => change(cli, *how, |state| {
            let pf = find_pf(state, pf)?;
            let new = pf.vfs.len() as u32..*n;
            let vf = if *unbound { new.map(unbound_vf).collect() } else { Vec::new() };
            Ok(of_pf(WantedPf { vfs: *n, vf, ..still(pf) }))
        }),
        Command::Remove { pf, how } => {
            change(cli, *how, |state| Ok(of_pf(WantedPf { vfs: 0, ..still(find_pf(state, pf)?) })))
        }
        Command::Set { pf, vf, what, how } => change(cli, *how, |state| {
            let vf = wanted_vf(*vf, what).map_err(|e| anyhow!(e))?;
            let pf = find_pf(state, pf)?;
            Ok(of_pf(WantedPf { vf: vec![vf], ..still(pf) }))
        }),
        Command::Bind { vf, driver, how } => change(cli, *how, |state| {
            let (pf, vf) = find_vf(state, vf)?;
            let vf = WantedVf { index: vf.index, driver: Some(driver.clone()), ..WantedVf::default() };
            Ok(of_pf(WantedPf { vf: vec![vf], ..still(pf) }))
        }),
        Command::Eswitch { pf, mode, how } => change(cli, *how, |state| {
            Ok(of_pf(WantedPf { eswitch: Some(*mode), ..still(find_pf(state, pf)?) }))
        }),
        Command::Port { pf, port, what } => port_command(cli, pf, *port, what),
        Command::Mdev(mdev) => mdev_command(cli, mdev),
        Command::Plan { file } => {
            let (state, _) = read(cli)?;
            let plan = planned(&state, &wanted(file)?)?;
            print(&describe(&plan));
            Ok(())
        }
        Command::Apply { file, how } => {
            let wanted = wanted(file)?;
            change(cli, *how, |_| Ok(wanted))
        }
        Command::Save => {
            let (state, _) = read(cli)?;
            print(Wanted::of(&state).to_file(&state).trim_end());
            Ok(())
        }
        Command::Export { vf, format } => {
            let (state, _) = read(cli)?;
            let (pf, vf) = find_vf(&state, vf)?;
            print(&export::export(pf, vf, *format)?);
            Ok(())
        }
        Command::Reclaim { function } => reclaim(cli, function),
        Command::Record { dir } => {
            ensure!(!dir.exists(), "{} is there already: name a new directory", dir.display());
            record(&*host(cli, false)?, dir).with_context(|| format!("recording in {}", dir.display()))
        }
        Command::WriteFile { .. } => bail!("not by hand"),
    }
}

/// The host that is spoken of; alone with it if it is to be changed.
fn host(cli: &Cli, change: bool) -> Result<Arc<dyn Host>> {
    if let Some(dir) = &cli.sysfs {
        return Ok(Arc::new(DirHost::new(dir)));
    }
    let mut host = RealHost::default();
    if change {
        host.writer = std::env::current_exe().ok().map(|me| (me, "write-file".into()));
        host.lock().map_err(|e| {
            let what = match e.kind() {
                ErrorKind::PermissionDenied => "run it as root",
                ErrorKind::WouldBlock => {
                    "another sriov is changing something, or its VFs are being removed still: wait for it"
                }
                _ => "it keeps others from changing something meanwhile, and has to be there",
            };
            anyhow!("/run/sriov.lock: {e}; {what}")
        })?;
    }
    Ok(Arc::new(host))
}

fn read(cli: &Cli) -> Result<(State, Facts)> {
    Ok(state::read(&*host(cli, false)?)?)
}

/// Plans, refuses what would lose something, and applies.
fn change(cli: &Cli, how: How, wanted: impl FnOnce(&State) -> Result<Wanted>) -> Result<()> {
    let host = host(cli, true)?;
    let (state, _) = state::read(&*host)?;
    let plan = planned(&state, &wanted(&state)?)?;
    if !plan.risks.is_empty() && !how.force {
        bail!("{} (--force does it all the same)", plan.risks.join("; "));
    }
    let limit = Duration::from_secs(how.timeout);
    let say = Box::new(|what: &str| eprintln!("sriov: {what}"));
    let applier = Applier { host, limit, every: Duration::from_secs(2), say };
    applier.run(&state, &plan.steps)?;
    if plan.steps.is_empty() {
        eprintln!("sriov: nothing to do");
    }
    Ok(())
}

fn planned(state: &State, wanted: &Wanted) -> Result<Plan> {
    plan::plan(state, wanted).map_err(|wrong| {
        let lines: Vec<_> = wrong.iter().map(ToString::to_string).collect();
        anyhow!("{}", lines.join("; "))
    })
}

fn describe(plan: &Plan) -> String {
    let mut lines: Vec<String> = plan.steps.iter().map(ToString::to_string).collect();
    if lines.is_empty() {
        lines.push("nothing to do".into());
    }
    lines.extend(plan.risks.iter().map(|risk| format!("! {risk}")));
    if !plan.risks.is_empty() {
        lines.push("! apply refuses this without --force".into());
    }
    lines.join("\n")
}

fn wanted(file: &Path) -> Result<Wanted> {
    File::read(file)?.parse()
}

fn to_json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)?)
}

fn find_pf<'a>(state: &'a State, name: &str) -> Result<&'a Pf> {
    let address = resolve(state, name)?;
    let pf = state.pfs.iter().find(|pf| pf.address() == address);
    pf.ok_or_else(|| plan::Impossible::NoPf(address).into())
}

fn find_vf<'a>(state: &'a State, name: &str) -> Result<(&'a Pf, &'a Vf)> {
    let address = resolve(state, name)?;
    let all = state.pfs.iter().flat_map(|pf| pf.vfs.iter().map(move |vf| (pf, vf)));
    let found = all.into_iter().find(|(_, vf)| vf.function.address == address);
    found.with_context(|| format!("{address} is no VF here: `sriov list --tree` says which there are"))
}

fn resolve(state: &State, name: &str) -> Result<PciAddr> {
    let what = "is neither a PCI address nor the interface of a function here: `sriov list --tree` says what there is";
    state::resolve(state, name).with_context(|| format!("'{name}' {what}"))
}

/// A function that stays as it is.
fn still(pf: &Pf) -> WantedPf {
    let vfs = pf.vfs.len() as u32;
    WantedPf { address: pf.address(), vfs, up: None, autoprobe: None, eswitch: None, vf: Vec::new() }
}

fn of_pf(pf: WantedPf) -> Wanted {
    Wanted { pfs: vec![pf], ..Wanted::default() }
}

fn unbound_vf(index: u32) -> WantedVf {
    // Bound to nothing, but free to be bound.
    WantedVf {
        index,
        driver: Some("none".into()),
        driver_override: Some(String::new()),
        ..WantedVf::default()
    }
}

fn port_command(cli: &Cli, pf: &str, port: Option<u32>, what: &[sriov_tools::host::PortSet]) -> Result<()> {
    let host = host(cli, port.is_some())?;
    let (state, facts) = state::read(&*host)?;
    let pf = find_pf(&state, pf)?.address();
    let ports: Vec<_> = facts.ports.iter().filter(|p| p.pf == pf).collect();
    let Some(port) = port else {
        ensure!(!ports.is_empty(), "{pf} has no ports: its driver offers none through devlink");
        print(&to_json(&ports)?);
        return Ok(());
    };
    for set in what {
        let refused = |e| anyhow!("devlink (pci/{pf}/{port}): {e}; `sriov port {pf}` lists what there is");
        host.set_port(pf, port, *set).map_err(refused)?;
    }
    Ok(())
}

fn mdev_command(cli: &Cli, mdev: &Mdev) -> Result<()> {
    match mdev {
        Mdev::List { json: true } => {
            let (state, _) = read(cli)?;
            print(&to_json(&serde_json::json!({ "types": state.mdev_types, "devices": state.mdevs }))?);
            Ok(())
        }
        Mdev::List { json: false } => {
            let (state, _) = read(cli)?;
            for kind in &state.mdev_types {
                let left = kind.available.map_or("?".into(), |n| n.to_string());
                print(&format!(
                    "{} {} {left} more ({})",
                    kind.parent,
                    kind.id,
                    kind.name.as_deref().unwrap_or("-")
                ));
            }
            for mdev in &state.mdevs {
                print(&format!("{} {} {}", mdev.parent, mdev.kind, mdev.uuid));
            }
            Ok(())
        }
        Mdev::Create { parent, kind, uuid } => change(cli, QUICK, |state| {
            let mdev = WantedMdev { uuid: uuid.clone(), parent: resolve(state, parent)?, kind: kind.clone() };
            Ok(Wanted { mdevs: vec![mdev], ..Wanted::default() })
        }),
        Mdev::Remove { uuid } => change(cli, QUICK, |state| {
            ensure!(state.mdevs.iter().any(|m| m.uuid == *uuid), "there is no mediated device {uuid}");
            let mdevs = Wanted::of(state).mdevs.into_iter().filter(|m| m.uuid != *uuid).collect();
            Ok(Wanted { mdevs, no_other_mdevs: true, ..Wanted::default() })
        }),
    }
}

const QUICK: How = How { force: false, timeout: 30 };

fn reclaim(cli: &Cli, function: &str) -> Result<()> {
    let host = host(cli, true)?;
    let (state, facts) = state::read(&*host)?;
    let address = resolve(&state, function)?;
    let lost: Vec<_> = facts.elsewhere.iter().filter(|e| e.address == address).collect();
    ensure!(
        !lost.is_empty(),
        "{address} has no interface in another network namespace (run as root to see all)"
    );
    for lost in lost {
        eprintln!("sriov: {}: back from {}", lost.interface, lost.namespace);
        host.reclaim(lost).map_err(|e| {
            anyhow!(
                "rtnetlink (moving {} from {}): {e}; if the name is taken here, rename one",
                lost.interface,
                lost.namespace
            )
        })?;
    }
    Ok(())
}
