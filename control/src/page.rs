//! The status page: one file without anything from elsewhere, which reads `/v1/stats` again and again.

use std::sync::LazyLock;

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page.html");

/// Nothing but this page's own script and styles runs, and it talks to nobody but its server (CSP level 3, 6.1).
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(inside(tag).as_bytes())));
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style")
    )
});

/// What is between the tags of this name, which are there once.
fn inside(tag: &str) -> &'static str {
    let begin = PAGE.split_once(&format!("<{tag}>")).map_or("", |(_, rest)| rest);
    begin.split_once(&format!("</{tag}>")).map_or("", |(inside, _)| inside)
}

/// The page, at `/`.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/", get(page))
}

async fn page() -> impl IntoResponse {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_one_script_one_style_and_nothing_from_elsewhere() {
        for tag in ["script", "style"] {
            assert!(!inside(tag).is_empty(), "no {tag}");
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1, "{tag}");
        }
        for from_elsewhere in ["http:", "https:", "//cdn", "@import", "src=", "eval(", "innerHTML", " style="]
        {
            assert!(!PAGE.contains(from_elsewhere), "{from_elsewhere}");
        }
        assert_eq!(POLICY.matches("'sha256-").count(), 2);
    }
}
