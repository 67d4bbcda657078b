//! What a call says: a body of JSON, or the part of a path or a query. What is wrong with one is a [`Problem`].

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::Method;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::problem::Problem;

/// Longest body, in bytes. A disk takes a few hundred.
const MAX_BODY: usize = 64 << 10;

/// A body of JSON, both ways.
#[derive(Clone, Copy, Debug)]
pub struct Json<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Json<T>, Problem> {
        // Calls that need not say anything may come without one; not what takes the place of something.
        let may_be_empty = request.method() == Method::POST;
        let body = Limited::new(request.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|e| Problem::bad(format!("the body cannot be read: {e}")))?.to_bytes();
        let body: &[u8] = if body.is_empty() && may_be_empty { b"{}" } else { &body };
        let mut json = serde_json::Deserializer::from_slice(body);
        let read = serde_path_to_error::deserialize(&mut json);
        let value = read.map_err(|e| {
            let key = e.path().to_string();
            let problem = Problem::bad(e.into_inner().to_string());
            if key == "." || key == "?" { problem } else { problem.at(key) }
        })?;
        json.end().map_err(|e| Problem::bad(format!("behind the body: {e}")))?;
        Ok(Json(value))
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// The parts of a path.
#[derive(Clone, Copy, Debug)]
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Path<T>, Problem> {
        let path = axum::extract::Path::from_request_parts(parts, state).await;
        let path = path.map_err(|e: PathRejection| Problem::bad(e.body_text()))?;
        Ok(Path(path.0))
    }
}

/// A query.
#[derive(Clone, Copy, Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Query<T>, Problem> {
        let query = axum::extract::Query::from_request_parts(parts, state).await;
        let query = query.map_err(|e: QueryRejection| Problem::bad(e.body_text()))?;
        Ok(Query(query.0))
    }
}
