//! DPDK's testpmd: a driver of network cards that shares no code with this workspace (virtio-user), and a back end
//! for a second opinion (net_vhost).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::process::{Process, find_program};
use crate::scene::{Scene, tail};

/// The program.
const PROGRAM: &str = "dpdk-testpmd";
/// How long it may take to come up or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Why it cannot run, if it cannot.
pub fn missing() -> Option<String> {
    program().is_none().then(|| format!("{PROGRAM} is not installed (apt-get install dpdk-dev)"))
}

/// Where it is.
pub fn program() -> Option<PathBuf> {
    find_program(PROGRAM)
}

/// Its command line for these devices: one forwarding thread, both of its threads on one CPU, no huge pages.
/// `mode` is what it does with packets: `io`, `macswap`, `flowgen`, `rxonly`, `csum`.
pub fn args(devices: &[String], mode: &str, more: &[&str]) -> Vec<String> {
    let eal = ["--lcores=0@0,1@0", "--no-huge", "-m=256", "--no-pci", "--no-shconf", "--no-telemetry"];
    let app = ["--", "--auto-start", "--stats-period=1", "--total-num-mbufs=8192"];
    let devices = devices.iter().map(|device| format!("--vdev={device}"));
    let mut args: Vec<String> = eal.iter().map(|&arg| arg.to_owned()).chain(devices).collect();
    args.extend(app.iter().chain(more).map(|&arg| arg.to_owned()));
    args.push(format!("--forward-mode={mode}"));
    args
}

/// A running testpmd that prints its counters every second; killed on drop.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    log: PathBuf,
}

/// What a port has counted since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Port {
    /// Packets received.
    pub received: u64,
    /// Packets received and not taken, or broken.
    pub receive_errors: u64,
    /// Packets sent.
    pub sent: u64,
    /// Packets that were not sent.
    pub send_errors: u64,
}

impl Testpmd {
    /// Starts it with [`args`].
    pub fn spawn(scene: &Scene, name: &str, args: &[String]) -> Result<Testpmd> {
        let log = scene.fresh_log(&format!("{name}-out"));
        let process = Process::spawn(scene, name, &program().context(PROGRAM)?, args)?;
        Ok(Testpmd { process, log })
    }

    /// Fails if it has ended.
    pub fn expect_alive(&mut self) -> Result<()> {
        match self.process.poll_exit()? {
            Some(status) => bail!("testpmd has ended ({status}): {}", self.said()),
            None => Ok(()),
        }
    }

    /// The end of what it has printed.
    pub fn said(&self) -> String {
        tail(&self.log, 30)
    }

    /// What a port has counted when it was last printed.
    pub fn port(&self, number: usize) -> Port {
        last_of(&self.process.stdout(), number).unwrap_or_default()
    }

    /// Ends it in good order. All that it has printed, counters of forwarding last.
    pub fn end(mut self) -> Result<String> {
        self.expect_alive()?;
        self.process.signal(Signal::SIGINT)?;
        let status = self.process.wait_exit(LIMIT).with_context(|| self.said())?;
        // It ends by the signal that it was sent, after all else.
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        ensure!(
            status.success() || signal == Some(Signal::SIGINT as i32),
            "testpmd: {status}\n{}",
            self.said()
        );
        Ok(self.process.stdout())
    }
}

/// The last counters of a port in what was printed:
///
/// ```text
///   ######################## NIC statistics for port 0  ########################
///   RX-packets: 5        RX-missed: 0          RX-bytes:  320
///   RX-errors: 0
///   RX-nombuf:  0
///   TX-packets: 37       TX-errors: 0          TX-bytes:  2368
/// ```
fn last_of(text: &str, port: usize) -> Option<Port> {
    let at = text.rfind(&format!("NIC statistics for port {port} "))?;
    let words: Vec<&str> = text[at..].split_whitespace().take(40).collect();
    let number = |name: &str| {
        let at = words.iter().position(|&word| word == name)?;
        words.get(at + 1)?.parse::<u64>().ok()
    };
    Some(Port {
        received: number("RX-packets:")?,
        receive_errors: number("RX-missed:")? + number("RX-errors:")? + number("RX-nombuf:")?,
        sent: number("TX-packets:")?,
        send_errors: number("TX-errors:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::{Port, last_of};

    #[test]
    fn finds_the_last_counters_of_a_port() {
        let port = |number, received| {
            format!(
                "  ####### NIC statistics for port {number}  #######\n  RX-packets: {received}  RX-missed: 1  RX-bytes:  320\n  \
                 RX-errors: 2\n  RX-nombuf:  3\n  TX-packets: 37  TX-errors: 4  TX-bytes:  2368\n\n  Throughput\n"
            )
        };
        let text = [port(0, 5), port(1, 6), port(0, 7), port(1, 8)].concat();
        let want = |received| Some(Port { received, receive_errors: 6, sent: 37, send_errors: 4 });
        assert_eq!((last_of(&text, 0), last_of(&text, 1), last_of(&text, 2)), (want(7), want(8), None));
        // In the middle of printing there is less.
        assert_eq!(last_of(&text[..text.len() - 60], 1), None);
    }
}
