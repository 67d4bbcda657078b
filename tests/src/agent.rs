//! The command line inside the guest, over a port of a virtio console (QEMU's UART loses bytes now and then), or the
//! second serial port of a machine of ours.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::wait;

/// What the guest's init prints when it takes commands.
const READY: &[u8] = b"@@AGENT READY@@\n";

/// The longest command line that is sent.
const MAX_COMMAND: usize = 2048;

/// How long a command in the guest may take when the test does not say.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// What a command in the guest left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output and standard error, in the order in which they were written.
    pub stdout: String,
    /// The exit code.
    pub code: i32,
}

/// A guest that runs commands.
pub trait Shell {
    /// Runs a command in the guest; when it does not end in time, the guest is of no more use.
    fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output>;

    /// Runs a command in the guest, for at most two minutes.
    fn run(&mut self, command: &str) -> Result<Output> {
        self.run_for(command, RUN_LIMIT)
    }

    /// Runs a command in the guest, fails unless it exits with 0, and returns its output without the last newline.
    fn check(&mut self, command: &str) -> Result<String> {
        let output = self.run(command)?;
        ensure!(output.code == 0, "guest command `{command}`: exit code {}\n{}", output.code, output.stdout);
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Waits until a command in the guest exits with 0.
    fn check_soon(&mut self, command: &str, limit: Duration) -> Result<()> {
        wait::until(command, limit, || Ok((self.run(command)?.code == 0).then_some(())))
    }

    /// Starts a command in the guest without waiting for it; [`Shell::join`] with the same name does.
    fn start(&mut self, name: &str, command: &str) -> Result<()> {
        let code = format!("/tmp/{name}.code");
        self.check(&format!("rm -f {code}; ( ( {command} ) >/tmp/{name}.out 2>&1; echo $? >{code} ) &"))?;
        Ok(())
    }

    /// Whether a command begun with [`Shell::start`] is still running.
    fn is_running(&mut self, name: &str) -> Result<bool> {
        Ok(self.run(&format!("test -s /tmp/{name}.code"))?.code != 0)
    }

    /// Waits for the end of a command begun with [`Shell::start`].
    fn join(&mut self, name: &str, limit: Duration) -> Result<Output> {
        let seconds = limit.as_secs();
        let wait = format!(
            "end=$(($(date +%s) + {seconds})); while ! test -s /tmp/{name}.code; do \
             test $(date +%s) -lt $end || exit 1; sleep 0.2; done"
        );
        if self.run_for(&wait, limit + Duration::from_secs(15))?.code != 0 {
            let state = self.run("cd /sys/block; head -n 1 */inflight */stat; ps | grep -v '\\['")?;
            bail!(
                "{name} has not ended within {limit:?}; the guest's disks and processes:\n{}",
                state.stdout
            );
        }
        let code = self.check(&format!("cat /tmp/{name}.code"))?;
        let stdout = self.check(&format!("cat /tmp/{name}.out"))?;
        Ok(Output { stdout, code: code.trim().parse()? })
    }
}

/// The connection to the agent.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    buffer: Vec<u8>,
    last_id: u64,
}

impl Agent {
    /// Listens where QEMU is going to connect to.
    pub fn listen(path: &Path) -> Result<UnixListener> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Wraps the connection to the guest.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self { stream, buffer: Vec::new(), last_id: 0 })
    }

    /// For an agent that has moved: commands are counted on from those that `before` has sent.
    pub fn go_on_after(&mut self, before: &Agent) {
        self.last_id = before.last_id;
    }

    /// Waits for the agent to come up, which it does at every boot.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = find(&self.buffer, READY) {
                self.buffer.drain(..at + READY.len());
                return Ok(());
            }
            self.fill(deadline).context("waiting for the guest to boot")?;
        }
    }

    /// Sends a command without waiting for it; for one that does not return.
    pub fn send(&mut self, command: &str) -> Result<u64> {
        ensure!(!command.contains('\n'), "a command is one line: {command:?}");
        ensure!(command.len() <= MAX_COMMAND, "command of {} bytes", command.len());
        self.last_id += 1;
        self.stream.write_all(format!("{} {command}\n", self.last_id).as_bytes())?;
        Ok(self.last_id)
    }

    /// Runs a command with `sh -c`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Output> {
        self.command(command, limit).with_context(|| format!("guest command `{command}`"))
    }

    fn command(&mut self, command: &str, limit: Duration) -> Result<Output> {
        self.buffer.clear();
        let deadline = Instant::now() + limit;
        let marker = format!("@@END {} ", self.send(command)?).into_bytes();
        loop {
            if let Some(at) = find(&self.buffer, &marker) {
                let code = &self.buffer[at + marker.len()..];
                if let Some(end) = find(code, b"@@\n") {
                    let code = std::str::from_utf8(&code[..end])?.parse()?;
                    let stdout = String::from_utf8_lossy(&self.buffer[..at]).replace('\r', "");
                    self.buffer.clear();
                    return Ok(Output { stdout, code });
                }
            } else if find(&self.buffer, READY).is_some() {
                bail!("the guest has rebooted meanwhile");
            }
            self.fill(deadline)?;
        }
    }

    /// Takes in what the guest has written, waiting for more until the deadline.
    fn fill(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seen = String::from_utf8_lossy(&self.buffer);
            bail!("timed out; the guest has written so far: {seen:?}");
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => bail!("the agent's port has been closed"),
            Ok(len) => self.buffer.extend_from_slice(&chunk[..len]),
            Err(error) if wait::goes_on(&error) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
