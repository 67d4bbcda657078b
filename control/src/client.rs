//! The other side of the API: a call, and its answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::body::Bytes;
use axum::http::HeaderMap;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::net::UnixStream;

use crate::problem::{CONTENT_TYPE, Problem};

/// How long a call may take. Removing a disk waits for its storage.
const LIMIT: Duration = Duration::from_secs(60);

/// All but what RFC 3986 calls unreserved.
const PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A part of a path: names may be paths of sockets.
pub fn part(name: &str) -> String {
    utf8_percent_encode(name, PART).to_string()
}

/// Somebody who calls.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// What came of a call.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// What the body is said to be.
    pub content_type: String,
    /// All that is said about the body.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body, which is JSON; `Null` if there is none.
    pub fn json(&self) -> Result<Value> {
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.body).context("the answer is no JSON")
    }

    /// The body of a call that went well; what is wrong, of another one.
    pub fn done(&self) -> Result<Value> {
        if (200..300).contains(&self.status) {
            return self.json();
        }
        if self.content_type == CONTENT_TYPE {
            let problem: Problem = serde_json::from_slice(&self.body).context("the answer is no problem")?;
            match problem.key {
                Some(key) if !problem.detail.contains(&key) => bail!("{key}: {}", problem.detail),
                _ => bail!("{}", problem.detail),
            }
        }
        bail!("status {}: {}", self.status, String::from_utf8_lossy(&self.body))
    }
}

impl Client {
    /// Of the daemon whose `--api` is at this path.
    pub fn new(socket: &Path) -> Client {
        Client { socket: socket.to_owned() }
    }

    /// Calls, with a body if there is one.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        let body = body.map(Value::to_string);
        self.send(method, path, body.unwrap_or_default().into())
    }

    /// Calls with any body.
    pub fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        runtime.block_on(self.exchange(method, path, body))
    }

    /// Asks for something, in a program that does other things meanwhile.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.exchange("GET", path, Vec::new()).await
    }

    async fn exchange(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Answer> {
        let call = self.call_within(method, path, body);
        tokio::time::timeout(LIMIT, call).await.context("the daemon does not answer")?
    }

    async fn call_within(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Answer> {
        let socket = self.socket.display();
        let stream = UnixStream::connect(&self.socket).await;
        let stream =
            stream.with_context(|| format!("cannot reach a daemon at {socket}; is that its --api?"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::builder()
            .method(Method::from_bytes(method.as_bytes())?)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let exchange = async move {
            let response = sender.send_request(request).await?;
            let status = response.status().as_u16();
            let headers = response.headers().clone();
            let header = headers.get("content-type").and_then(|v| v.to_str().ok());
            let content_type = header.unwrap_or_default().to_owned();
            let body = response.into_body().collect().await?.to_bytes().to_vec();
            anyhow::Ok(Answer { status, content_type, headers, body })
        };
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = connection => {
                ended.context("the daemon has hung up")?;
                exchange.await
            }
        }
    }
}
