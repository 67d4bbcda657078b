//! QEMU's control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait;

/// How long QEMU may take to answer a command.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A QMP connection in command mode. Events that arrive between commands are kept until they are asked for.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        let mut qmp = Self { stream, buffer: Vec::new(), events: Vec::new() };
        let greeting = qmp.message(Instant::now() + ANSWER_LIMIT)?;
        if greeting.get("QMP").is_none() {
            bail!("QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.raw(&request).with_context(|| format!("QMP {request}"))
    }

    /// Sends a complete request, such as `{"execute": "query-status"}`, and returns what it returns.
    pub fn raw(&mut self, request: &Value) -> Result<Value> {
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.message(deadline)?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                bail!("{}", error["desc"].as_str().unwrap_or("unknown error"));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Forgets the events that have arrived so far.
    pub fn clear_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event that satisfies `accept`, which may have arrived before; `Ok(None)` when it does not
    /// come in time.
    pub fn wait_event(&mut self, limit: Duration, accept: impl Fn(&Value) -> bool) -> Result<Option<Value>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(&accept) {
                return Ok(Some(self.events.remove(at)));
            }
            match self.try_message(deadline)? {
                Some(event) => self.events.push(event),
                None => return Ok(None),
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        self.try_message(deadline)?.context("QEMU does not answer")
    }

    fn try_message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("QEMU has closed the control socket"),
                Ok(len) => self.buffer.extend_from_slice(&chunk[..len]),
                Err(error) if wait::goes_on(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
