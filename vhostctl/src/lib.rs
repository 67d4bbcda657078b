//! `vhostctl`: asks a running `vhost-blk` or `vhost-net` for things, over its control API (docs/control.md).

mod rates;
mod table;
mod top;
mod upgrade;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use control::client::{Client, part};
use serde_json::{Map, Value, json};

/// Asks a running vhost-blk or vhost-net for things, or tells it to do something.
#[derive(Debug, Parser)]
#[command(name = "vhostctl", version, max_term_width = 110)]
struct Cli {
    /// The daemon's --api
    #[arg(
        long,
        short,
        value_name = "PATH",
        global = true,
        env = "VHOSTCTL_API",
        default_value = "/run/vhost-blk/api"
    )]
    api: PathBuf,

    /// Print what the daemon answers, as JSON
    #[arg(long, global = true)]
    json: bool,

    /// Print again every so many seconds
    #[arg(long, value_name = "SECONDS", global = true, num_args = 0..=1, default_missing_value = "2")]
    watch: Option<f64>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the daemon is
    Info,
    /// All disks, or ports
    List,
    /// A disk or port, and its queues
    Show {
        /// Its name
        name: String,
    },
    /// Serve one more disk or port
    Add {
        /// Keys as of vhost-blk --disk, such as socket-path=/run/a.sock blk-file=/img/a.img num-queues=4, or of
        /// vhost-net --port
        #[arg(value_name = "KEY=VALUE", required = true)]
        keys: Vec<String>,
    },
    /// Make a clone of an image, and serve it as one more disk if keys are given
    Clone {
        /// The image: qcow2, or FORMAT:PATH
        base: String,
        /// The clone's file, which must not be there if it is not served
        file: String,
        /// Keys as of vhost-blk --disk, such as socket-path=/run/a.sock
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Copy up all that a disk's image has from those below it, while it is in use, so that it needs them no more
    Flatten {
        /// Name of the disk
        name: String,
        /// Copy no more; what was copied stays so
        #[arg(long)]
        stop: bool,
    },
    /// All pools of clones
    Pools,
    /// Serve a disk or port no more, once what is in flight is finished
    Remove {
        /// Its name
        name: String,
        /// Also if a front end is connected, which is hung up on
        #[arg(long)]
        force: bool,
    },
    /// Have a guest see that its image has grown
    Grow {
        /// Name of the disk
        name: String,
        /// Make the image's file this large first, such as 20G
        size: Option<String>,
    },
    /// Take no requests of a disk for now, or nothing from and for the guest of a port
    Pause {
        /// Its name
        name: String,
    },
    /// Go on with a disk or port
    Resume {
        /// Its name
        name: String,
    },
    /// Record the requests of a disk to a new file, or no more
    Record {
        /// Name of the disk
        name: String,
        /// The file; or off
        file: String,
    },
    /// Have the link of a port up or down
    Link {
        /// Name of the port
        name: String,
        /// up or down
        #[arg(value_parser = ["up", "down"])]
        state: String,
    },
    /// The capture of packets that there is, or begin one to a new file, or end it
    Capture {
        /// The file; or off
        file: Option<String>,
        /// Bytes of each frame, at most
        #[arg(long, value_name = "BYTES", requires = "file")]
        snaplen: Option<u32>,
        /// What to capture, such as "tcp port 80 or arp"
        #[arg(long, value_name = "EXPRESSION", requires = "file")]
        filter: Option<String>,
    },
    /// The addresses that switches have learnt
    Fdb {
        /// Of the switch of this name only
        switch: Option<String>,
    },
    /// The switches of a daemon
    Switches,
    /// Have there be one switch more, without ports
    AddSwitch {
        /// Keys as of vhost-net --switch, such as name=blue mac-ageing=60
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Have a switch that has no ports be no more
    RemoveSwitch {
        /// Name of the switch
        name: String,
    },
    /// The limits of a disk or port, or keep it to others: none that is not named
    Limit {
        /// Its name
        name: String,
        /// Keys as of vhost-blk --limit, such as iops-total=1000 bps-write=100M, or of vhost-net --port, such as tx-bps=100M;
        /// none for no limit at all
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Move queues of a disk or port to another reactor
    Move {
        /// Its name
        name: String,
        /// Number of the reactor
        reactor: usize,
        /// Number of the queue; without, all of them
        #[arg(long)]
        queue: Option<u16>,
    },
    /// All reactors
    Reactors,
    /// Start a reactor more
    AddReactor {
        /// CPU to pin it to
        #[arg(long)]
        cpu: Option<usize>,
    },
    /// End a reactor, once its queues have moved to others
    Retire {
        /// Its number
        reactor: usize,
    },
    /// How reactors wait for requests, or have them wait in another way
    Poll {
        /// busy, adaptive or event
        mode: Option<String>,
    },
    /// Write what has changed into the daemon's configuration file
    Save,
    /// Start a newer daemon, which takes over from the running one while its guests run
    Upgrade(upgrade::Upgrade),
    /// Watch reactors, disks and queues in this terminal
    Top {
        /// Seconds between two looks
        #[arg(long, short, default_value_t = 1.0)]
        interval: f64,
    },
    /// Show the daemon's status page, and /metrics, to browsers and Prometheus; nothing can be changed there
    Page {
        /// Address to listen on: whoever reaches it sees everything
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
        /// A name that the address may be called by, besides localhost
        #[arg(long, value_name = "NAME")]
        name: Vec<String>,
    },
    /// All counters as Prometheus wants them
    Metrics,
    /// The API's own description (OpenAPI)
    Openapi,
    /// Any call at all
    Call {
        /// GET, POST, PUT or DELETE
        method: String,
        /// Such as /v1/disks
        path: String,
        /// JSON
        body: Option<String>,
    },
    /// Print a script that completes commands in a shell
    Completions {
        /// Which one
        shell: Shell,
    },
}

/// Method, path and body of a call.
type Call = (&'static str, String, Option<Value>);

/// `list` is what the daemon has a list of.
fn call_of(command: &Command, list: &str) -> Result<Call> {
    let disk = |name: &str, what: &str| format!("{list}/{}{what}", part(name));
    Ok(match command {
        Command::Info => ("GET", "/v1/daemon".into(), None),
        Command::List => ("GET", list.into(), None),
        Command::Show { name } => ("GET", disk(name, ""), None),
        Command::Add { keys } => ("POST", list.into(), Some(spec(keys)?)),
        Command::Clone { base, file, keys } if keys.is_empty() => {
            ("POST", "/v1/clones".into(), Some(json!({ "base": base, "file": file })))
        }
        Command::Clone { base, file, keys } => {
            let mut spec = spec(keys)?;
            spec["clone-of"] = json!(base);
            spec["blk-file"] = json!(file);
            ("POST", "/v1/disks".into(), Some(spec))
        }
        Command::Flatten { name, stop } => {
            (if *stop { "DELETE" } else { "POST" }, disk(name, "/flatten"), None)
        }
        Command::Pools => ("GET", "/v1/pools".into(), None),
        Command::Remove { name, force: false } => ("DELETE", disk(name, ""), None),
        Command::Remove { name, force: true } => ("DELETE", disk(name, "?force=true"), None),
        Command::Grow { name, size } => {
            let body = size.as_ref().map_or(json!({}), |size| json!({ "size": size }));
            ("POST", disk(name, "/grow"), Some(body))
        }
        Command::Pause { name } => ("POST", disk(name, "/pause"), None),
        Command::Resume { name } => ("POST", disk(name, "/resume"), None),
        Command::Record { name, file } if file == "off" => ("DELETE", disk(name, "/record"), None),
        Command::Record { name, file } => ("PUT", disk(name, "/record"), Some(json!({ "file": file }))),
        Command::Link { name, state } => ("PUT", disk(name, "/link"), Some(json!({ "up": state == "up" }))),
        Command::Capture { file: None, .. } => ("GET", "/v1/capture".into(), None),
        Command::Capture { file: Some(file), .. } if file == "off" => ("DELETE", "/v1/capture".into(), None),
        Command::Capture { file, snaplen, filter } => {
            let said = [("file", json!(file)), ("snaplen", json!(snaplen)), ("filter", json!(filter))];
            let said = said.into_iter().filter(|(_, value)| !value.is_null());
            ("PUT", "/v1/capture".into(), Some(said.map(|(key, value)| (key.to_owned(), value)).collect()))
        }
        Command::Fdb { switch: None } => ("GET", "/v1/fdb".into(), None),
        Command::Fdb { switch: Some(name) } => ("GET", format!("/v1/fdb?switch={}", part(name)), None),
        Command::Switches => ("GET", "/v1/switches".into(), None),
        Command::AddSwitch { keys } => ("POST", "/v1/switches".into(), Some(spec(keys)?)),
        Command::RemoveSwitch { name } => ("DELETE", format!("/v1/switches/{}", part(name)), None),
        Command::Limit { name, keys } if keys.is_empty() => ("GET", disk(name, "/limits"), None),
        Command::Limit { name, keys } if *keys == ["none"] => ("PUT", disk(name, "/limits"), Some(json!({}))),
        Command::Limit { name, keys } => ("PUT", disk(name, "/limits"), Some(spec(keys)?)),
        Command::Move { name, reactor, queue } => {
            let mut body = json!({ "reactor": reactor });
            if let Some(queue) = queue {
                body["queue"] = json!(queue);
            }
            ("PUT", disk(name, "/reactor"), Some(body))
        }
        Command::Reactors => ("GET", "/v1/reactors".into(), None),
        Command::AddReactor { cpu } => {
            ("POST", "/v1/reactors".into(), Some(cpu.map_or(json!({}), |cpu| json!({ "cpu": cpu }))))
        }
        Command::Retire { reactor } => ("DELETE", format!("/v1/reactors/{reactor}"), None),
        Command::Poll { mode: None } => ("GET", "/v1/poll".into(), None),
        Command::Poll { mode: Some(mode) } => ("PUT", "/v1/poll".into(), Some(json!({ "poll": mode }))),
        Command::Save => ("POST", "/v1/save".into(), None),
        Command::Metrics => ("GET", "/metrics".into(), None),
        Command::Openapi => ("GET", "/v1/openapi.json".into(), None),
        Command::Call { .. }
        | Command::Completions { .. }
        | Command::Top { .. }
        | Command::Page { .. }
        | Command::Upgrade(_) => bail!("no call of its own"),
    })
}

/// A disk of keys and values. The daemon reads numbers and truth values out of texts, too.
fn spec(keys: &[String]) -> Result<Value> {
    let mut spec = Map::new();
    for pair in keys.iter().flat_map(|keys| keys.split(',')) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, "on"));
        if spec.insert(key.into(), value.into()).is_some() {
            bail!("{key} is there twice");
        }
    }
    Ok(Value::Object(spec))
}

/// The program.
pub fn main() -> ExitCode {
    daemon::main(run)
}

/// Its command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

fn run(cli: &Cli) -> Result<()> {
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "vhostctl", &mut script);
        daemon::print(String::from_utf8_lossy(&script).trim_end());
        return Ok(());
    }
    match &cli.command {
        Command::Top { interval } => return top::run(Client::new(&cli.api), *interval),
        Command::Page { listen, name } => return page(&cli.api, *listen, name.clone()),
        _ => {}
    }
    let Some(seconds) = cli.watch else {
        daemon::print(&answer(cli)?);
        return Ok(());
    };
    let every = Duration::try_from_secs_f64(seconds)?.max(Duration::from_millis(100));
    loop {
        // From the top of an empty screen.
        daemon::print(&format!("\x1b[H\x1b[2J{}", answer(cli)?));
        std::thread::sleep(every);
    }
}

/// Listens, says where, and passes on until it is ended.
fn page(api: &Path, listen: SocketAddr, names: Vec<String>) -> Result<()> {
    let client = Client::new(api);
    client.call("GET", "/v1/daemon", None)?.done()?;
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    daemon::print(&format!("http://{}/", listener.local_addr()?));
    Ok(control::relay::serve(listener, client, names)?)
}

fn answer(cli: &Cli) -> Result<String> {
    let client = Client::new(&cli.api);
    let answer = match &cli.command {
        Command::Upgrade(upgrade) => return shown(cli, &upgrade::run(&client, upgrade)?),
        Command::Call { method, path, body } => {
            client.send(method, path, body.clone().unwrap_or_default().into_bytes())?
        }
        command => {
            let daemon = client.call("GET", "/v1/daemon", None)?.done()?;
            let (method, path, body) = call_of(command, list_of(&daemon))?;
            client.call(method, &path, body.as_ref())?
        }
    };
    if matches!(cli.command, Command::Metrics) && answer.status == 200 {
        return Ok(String::from_utf8_lossy(&answer.body).trim_end().to_owned());
    }
    shown(cli, &answer.done()?)
}

/// What a daemon has a list of.
fn list_of(daemon: &Value) -> &'static str {
    if daemon["program"] == "vhost-net" { "/v1/ports" } else { "/v1/disks" }
}

fn shown(cli: &Cli, value: &Value) -> Result<String> {
    let raw = cli.json || matches!(cli.command, Command::Openapi | Command::Call { .. });
    Ok(match value {
        Value::Null => "done".into(),
        value if raw => serde_json::to_string_pretty(value)?,
        value => table::text(value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_that_are_paths_are_one_part_of_a_path() {
        let cli = Cli::parse_from(["vhostctl", "remove", "/run/a b.sock", "--force"]);
        let (method, path, _) = call_of(&cli.command, "/v1/disks").unwrap();
        assert_eq!((method, path.as_str()), ("DELETE", "/v1/disks/%2Frun%2Fa%20b.sock?force=true"));
    }

    #[test]
    fn disks_are_keys_and_values() {
        let keys = ["socket-path=/a,read-only".to_owned(), "num-queues=4".to_owned()];
        assert_eq!(
            spec(&keys).unwrap(),
            json!({ "socket-path": "/a", "read-only": "on", "num-queues": "4" })
        );
        assert!(spec(&["a=1,a=2".to_owned()]).is_err());
    }
}
