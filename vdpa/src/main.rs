//! `vdpactl`: devices on the kernel's vDPA bus.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::Value;
use vdpa::cli::{Cli, Command, Serve};
use vdpa::netlink::{Bus, NetOptions, show};
use vdpa::{detach, serve, sysfs};

fn main() -> ExitCode {
    daemon::main(run)
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Attach(attach) => serve::attach(attach)?,
        Command::Detach(detach) => detach::detach(detach)?,
        Command::Serve(Serve::Blk(blk)) => serve::serve_blk(blk)?,
        Command::Serve(Serve::Net(net)) => serve::serve_net(net)?,
        Command::List(s) | Command::Show(s) => {
            print(s.json, &show::devices(&Bus::open()?.devices(s.name.as_deref())?));
        }
        Command::Config(s) => print(s.json, &show::config(&Bus::open()?.config(s.name.as_deref())?)),
        Command::Mgmtdev(s) => print(s.json, &show::mgmtdevs(&Bus::open()?.mgmtdevs(s.name.as_deref())?)),
        Command::Stats(s) => print(s.json, &show::statistics(&Bus::open()?.statistics(&s.name, s.queue)?)),
        Command::Add(add) => {
            let net = NetOptions { mac: add.mac, mtu: add.mtu, max_pairs: add.max_vqp };
            Bus::open()?.add(&add.name, &add.mgmtdev, net)?;
            if let Some(driver) = add.driver {
                sysfs::bind(&add.name, driver)?;
                daemon::print(&sysfs::wait_for_outcome(&add.name, driver)?.to_string());
            }
        }
        Command::Del(del) => Bus::open()?.delete(&del.name)?,
    }
    Ok(())
}

fn print(json: bool, shown: &Value) {
    let text = if json { shown.to_string() } else { show::plain(shown) };
    if !text.is_empty() {
        daemon::print(&text);
    }
}
