//! A headless Chromium, told what to do over its DevTools protocol: by two pipes, a message each between zero bytes.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::process::find_program;
use kickless_tests::scene::Scene;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::rig::LIMIT;

pub fn missing() -> Option<String> {
    find_program("chromium").is_none().then(|| "no chromium (package chromium)".into())
}

pub struct Browser {
    child: Child,
    to: File,
    from: Receiver<Value>,
    session: Option<String>,
    last: u64,
    /// What the page has complained of.
    pub complaints: Vec<String>,
}

impl Browser {
    pub fn start(scene: &Scene) -> Result<Browser> {
        let (to, from) = (scene.path("to-chromium"), scene.path("from-chromium"));
        for fifo in [&to, &from] {
            mkfifo(fifo, Mode::S_IRWXU)?;
        }
        // Its ends of the pipes are descriptors 3 and 4. Without the rest it looks for its maker's servers.
        let script = r#"exec setpriv --pdeathsig KILL -- chromium --headless --no-sandbox --disable-gpu --disable-quic \
            --no-first-run --disable-background-networking --disable-component-update --disable-sync \
            --disable-dev-shm-usage --window-size=1280,1000 \
            --user-data-dir="$1" --remote-debugging-pipe about:blank 3<"$2" 4>"$3""#;
        let child = Command::new("sh")
            .args(["-c", script, "sh"])
            .args([scene.path("chromium"), to.clone(), from.clone()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(scene.fresh_log("chromium"))?)
            .spawn()?;
        // Both ways, so that opening does not wait for a browser that does not come.
        let both = |path| OpenOptions::new().read(true).write(true).open(path);
        let (to, from) = (both(&to)?, BufReader::new(both(&from)?));
        let (tell, told) = channel();
        std::thread::spawn(move || {
            for message in from.split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { return };
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Browser { child, to, from: told, session: None, last: 0, complaints: Vec::new() };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach)?["sessionId"].as_str().map(str::to_owned);
        browser.session = session;
        for domain in ["Runtime.enable", "Log.enable", "Page.enable", "Network.enable"] {
            browser.call(domain, json!({}))?;
        }
        Ok(browser)
    }

    /// Tells it to do something: what came of that.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last += 1;
        let id = self.last;
        let mut message = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes())?;
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message = self.from.recv_timeout(left).with_context(|| format!("chromium on {method}"))?;
            self.hear(&message);
            if message["id"] == json!(id) {
                if let Some(error) = message.get("error") {
                    bail!("{method}: {error}");
                }
                return Ok(message["result"].clone());
            }
        }
    }

    fn hear(&mut self, message: &Value) {
        let params = &message["params"];
        let complaint = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => Some(params["exceptionDetails"].to_string()),
            Some("Runtime.consoleAPICalled") => Some(params["args"].to_string()),
            // Warnings are of how slow it is to look at pixels, as the test does.
            Some("Log.entryAdded") if params["entry"]["level"] == "error" => {
                Some(params["entry"].to_string())
            }
            _ => None,
        };
        self.complaints.extend(complaint);
    }

    pub fn open(&mut self, url: &str) -> Result<()> {
        let went = self.call("Page.navigate", json!({ "url": url }))?;
        ensure!(went.get("errorText").is_none(), "{url}: {went}");
        Ok(())
    }

    /// What an expression is in the page.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", params)?;
        if let Some(exception) = result.get("exceptionDetails") {
            bail!("{expression}: {exception}");
        }
        Ok(result["result"]["value"].clone())
    }

    /// A picture of the page.
    pub fn picture(&mut self) -> Result<String> {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }))?;
        Ok(shot["data"].as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
