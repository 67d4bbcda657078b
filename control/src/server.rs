//! The socket, and who may use it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use poll_engine::session::listen::{ListenError, Listener};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, oneshot};
use tracing::warn;

use crate::problem::Problem;

/// Threads for what takes long, and how long they stay when there is nothing to do. Calls come one after the other, so that
/// further ones are for those that only look.
const BLOCKING: usize = 4;
const KEEP: Duration = Duration::from_secs(2);
/// How long calls that run may take to end when the daemon does.
const FAREWELL: Duration = Duration::from_secs(1);

/// Bits of a file's mode by which its group, and all others, may write to it: connect to it, of a socket.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// A running server. Dropped, it is gone, and so is its socket.
#[derive(Debug)]
pub struct Api {
    listener: Listener,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Who is at the other end.
#[derive(Clone, Debug)]
struct Peer {
    uid: u32,
    gid: u32,
    pid: i32,
}

/// Who may be.
#[derive(Clone, Copy, Debug)]
struct Access {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Access {
    /// Those that the socket's owner, group and mode let connect: by its file, which the kernel has looked at already, and
    /// also those who got at it in another way.
    fn allows(self, peer: &Peer) -> bool {
        let is_of_group = || peer.gid == self.gid || groups_of(peer.pid).contains(&self.gid);
        peer.uid == 0
            || peer.uid == self.uid
            || self.mode & OTHERS_WRITE != 0
            || self.mode & GROUP_WRITES != 0 && is_of_group()
    }
}

/// The further groups of a process; none where that cannot be known.
fn groups_of(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    line.into_iter().flat_map(str::split_whitespace).filter_map(|gid| gid.parse().ok()).collect()
}

impl Connected<IncomingStream<'_, Accepting>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Accepting>) -> Peer {
        stream.remote_addr().clone()
    }
}

/// The socket as axum wants it.
struct Accepting(UnixListener);

impl axum::serve::Listener for Accepting {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (UnixStream, Peer) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => {
                    if let Ok(who) = getsockopt(&stream.as_fd(), sockopt::PeerCredentials) {
                        return (stream, Peer { uid: who.uid(), gid: who.gid(), pid: who.pid() });
                    }
                }
                Err(e) => {
                    warn!("cannot accept on the API's socket: {e}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer { uid: geteuid().as_raw(), gid: 0, pid: 0 })
    }
}

/// Binds the socket, with this mode; beside one that a process has which is taken over from, until [`Api::replace`].
pub fn bind(path: &Path, mode: u32, beside: bool) -> Result<Listener, ListenError> {
    if beside { Listener::bind_mode_beside(path, mode) } else { Listener::bind_mode(path, mode) }
}

impl Api {
    /// Serves `router`.
    pub fn start(listener: Listener, router: Router) -> io::Result<Api> {
        let socket = listener.socket()?;
        let meta = listener.path().map(std::fs::metadata).transpose()?;
        let access = meta.map_or(Access { uid: geteuid().as_raw(), gid: 0, mode: 0 }, |meta| Access {
            uid: geteuid().as_raw(),
            gid: meta.gid(),
            mode: meta.mode(),
        });
        let router = router
            .fallback(|| async { Problem::missing("no such call; GET /v1/openapi.json has all there are") })
            .method_not_allowed_fallback(|| async {
                Problem::new(
                    StatusCode::METHOD_NOT_ALLOWED,
                    "not with this method; GET /v1/openapi.json has all calls",
                )
            })
            .layer(from_fn_with_state(access, admit));
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING)
            .thread_keep_alive(KEEP)
            .thread_name("api-call")
            .build()?;
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            runtime.block_on(async move {
                let socket = match UnixListener::from_std(socket) {
                    Ok(socket) => Accepting(socket),
                    Err(e) => return warn!("the API is not served: {e}"),
                };
                let service = router.into_make_service_with_connect_info::<Peer>();
                tokio::select! {
                    served = axum::serve(socket, service) => {
                        served.unwrap_or_else(|e| warn!("the API is not served any more: {e}"));
                    }
                    _ = stopped => {}
                }
            });
            runtime.shutdown_timeout(FAREWELL);
        })?;
        Ok(Api { listener, stop: Some(stop), thread: Some(thread) })
    }

    /// Takes the place on `path` that its socket was bound beside.
    pub fn replace(&mut self, path: &Path) -> Result<(), ListenError> {
        self.listener.replace(path)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

async fn admit(
    State(access): State<Access>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if access.allows(&peer) {
        return next.run(request).await;
    }
    let Access { uid, gid, .. } = access;
    Problem::new(
        StatusCode::FORBIDDEN,
        format!(
            "user {} may not do this: root and user {uid} may, and group {gid} if the socket's mode lets it",
            peer.uid
        ),
    )
    .into_response()
}

/// Calls that change something, one after the other, on threads where they may wait.
#[derive(Clone, Debug, Default)]
pub struct Turn(Arc<Mutex<()>>);

impl Turn {
    /// Waits for its turn, and does it. It is done also if the caller has gone meanwhile.
    pub async fn take<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let turn = Arc::clone(&self.0).lock_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            act()
        });
        done.await.unwrap_or_else(|e| Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_is_that_of_the_file() {
        let peer = |uid, gid| Peer { uid, gid, pid: -1 };
        for (mode, uid, gid, allowed) in [
            (0o600, 0, 0, true),
            (0o600, 7, 1, true),
            (0o600, 8, 5, false),
            (0o660, 8, 5, true),
            (0o660, 8, 6, false),
            (0o640, 8, 5, false),
            (0o666, 9, 9, true),
        ] {
            let access = Access { uid: 7, gid: 5, mode };
            assert_eq!(access.allows(&peer(uid, gid)), allowed, "{mode:o} {uid} {gid}");
        }
        assert_eq!(groups_of(std::process::id() as i32).len(), nix::unistd::getgroups().unwrap().len());
    }
}
