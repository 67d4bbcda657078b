//! The command line inside the guest, over a port of a virtio console (an emulated UART
//! loses bytes now and then).

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// What the guest's init prints when it takes commands.
const READY: &[u8] = b"@@AGENT READY@@\n";

/// The longest command line that is sent.
const MAX_COMMAND: usize = 2048;

/// What a command in the guest left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output and standard error, in the order in which they were written.
    pub stdout: String,
    /// The exit code.
    pub code: i32,
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

    /// Wraps the connection that QEMU made.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self { stream, buffer: Vec::new(), last_id: 0 })
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
            Ok(0) => bail!("QEMU has closed the agent's port"),
            Ok(len) => self.buffer.extend_from_slice(&chunk[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
