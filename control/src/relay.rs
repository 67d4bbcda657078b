//! What may be looked at of a daemon, on a network address: for browsers, and for Prometheus, which cannot connect to a Unix
//! socket. Nothing can be changed through it.

use std::io;
use std::net::{IpAddr, TcpListener};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::client::Client;
use crate::problem::Problem;

/// What is passed on.
const PATHS: [&str; 3] = ["/", "/v1/stats", "/metrics"];

/// What of an answer is passed on.
const HEADERS: [header::HeaderName; 5] = [
    header::CONTENT_TYPE,
    header::CONTENT_SECURITY_POLICY,
    header::X_CONTENT_TYPE_OPTIONS,
    header::REFERRER_POLICY,
    header::CACHE_CONTROL,
];

/// Whether a `Host` may be asked for. A page from elsewhere can have its own name mean this address (DNS rebinding), but not
/// have no name at all.
fn is_ours(headers: &HeaderMap, names: &[String]) -> bool {
    let host = headers.get(header::HOST).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok() || names.iter().any(|n| n == name)
}

async fn admit(State(names): State<Vec<String>>, request: Request, next: Next) -> Response {
    if is_ours(request.headers(), &names) {
        return next.run(request).await;
    }
    Problem::new(StatusCode::FORBIDDEN, "not by this name; use the address, or allow the name with --name")
        .into_response()
}

async fn pass(State(client): State<Client>, request: Request) -> Response {
    match client.get(request.uri().path()).await {
        Ok(answer) => {
            let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
            let mut response = (status, answer.body).into_response();
            response.headers_mut().remove(header::CONTENT_TYPE);
            for name in HEADERS {
                if let Some(value) = answer.headers.get(&name) {
                    response.headers_mut().insert(name, value.clone());
                }
            }
            response
        }
        Err(e) => Problem::new(StatusCode::BAD_GATEWAY, format!("{e:#}")).into_response(),
    }
}

/// Passes on until the process ends; `names` are those that the address may be called by.
pub fn serve(listener: TcpListener, client: Client, names: Vec<String>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut router = Router::new();
    for path in PATHS {
        router = router.route(path, get(pass));
    }
    let router = router
        .fallback(|| async { Problem::missing("only /, /v1/stats and /metrics are passed on") })
        .with_state(client)
        .layer(from_fn_with_state(names, admit));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(async { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_others_may_have_made_are_not_ours() {
        let host = |text: &str| HeaderMap::from_iter([(header::HOST, text.parse().unwrap())]);
        let names = ["box.lan".to_owned()];
        for ours in ["127.0.0.1:8080", "localhost", "localhost:1", "[::1]:8080", "10.0.0.7", "box.lan:80"] {
            assert!(is_ours(&host(ours), &names), "{ours}");
        }
        for other in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", "x:y"]
        {
            assert!(!is_ours(&host(other), &names), "{other}");
        }
        assert!(!is_ours(&HeaderMap::new(), &names));
    }
}
