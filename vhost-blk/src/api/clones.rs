//! Calls about clones, pools of them, and images that are made to need no other.

use std::path::PathBuf;

use axum::extract::State;
use axum::http::StatusCode;
use control::body::{Json, Path};
use control::problem::Problem;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, DiskDetail, Fails};
use crate::clone::Base;
use crate::exports::Served;

/// A clone to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewClone {
    /// What it begins as: a qcow2 image, or FORMAT:PATH.
    #[serde(deserialize_with = "text")]
    #[schema(value_type = String, example = "base.qcow2")]
    base: Base,
    /// Its file, which must not be there.
    #[schema(value_type = String)]
    file: PathBuf,
}

fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Base, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

/// A clone.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// Its file.
    file: String,
    /// What it is a clone of.
    base: String,
}

/// Clones that are kept ready.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// What they are clones of.
    base: String,
    /// How many are to be there.
    count: u16,
    /// How many are.
    ready: usize,
}

/// How far an image is on its way to need no other.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Flattening {
    /// Bytes of the disk that were copied, or found to need no copying.
    copied: u64,
    /// Bytes of the disk.
    bytes: u64,
}

/// The image below that of a disk.
pub fn backing(s: &Served) -> Option<String> {
    let (path, _) = s.image()?.backing().ok()??;
    Some(path.display().to_string())
}

/// How far it is.
pub fn flattening(s: &Served) -> Option<Flattening> {
    let at = s.image()?.flattening()?;
    Some(Flattening { copied: at.copied, bytes: at.bytes })
}

/// Makes a clone that nobody serves yet
#[utoipa::path(post, path = "/v1/clones", request_body = NewClone, responses((status = 201, body = Made), Fails))]
pub async fn make(
    State(api): State<Api>,
    Json(new): Json<NewClone>,
) -> Result<(StatusCode, Json<Made>), Problem> {
    let made = Made { file: new.file.display().to_string(), base: new.base.to_string() };
    api.change(move |exports| exports.clone_to(&new.base, &new.file)).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// All pools of clones
#[utoipa::path(get, path = "/v1/pools", responses((status = 200, body = Vec<Pool>), Fails))]
pub async fn pools(State(api): State<Api>) -> Json<Vec<Pool>> {
    let pools = api.exports.pools();
    let pool = |s: &crate::pool::State| Pool {
        base: s.spec.base.to_string(),
        count: s.spec.count,
        ready: s.ready(),
    };
    Json(pools.iter().map(pool).collect())
}

/// Begins to copy up all that its image has from the images below it, so that it needs them no more
#[utoipa::path(post, path = "/v1/disks/{name}/flatten", params(("name" = String, Path)), responses((status = 202, body = DiskDetail), Fails))]
pub async fn flatten(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<DiskDetail>), Problem> {
    let served = api.change(move |exports| exports.flatten(&name)).await?;
    Ok((StatusCode::ACCEPTED, Json((&*served).into())))
}

/// Copies no more; what was copied stays so
#[utoipa::path(delete, path = "/v1/disks/{name}/flatten", params(("name" = String, Path)), responses((status = 200, body = DiskDetail), Fails))]
pub async fn stop_flatten(State(api): State<Api>, Path(name): Path<String>) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.stop_flatten(&name)).await?;
    Ok(Json((&*served).into()))
}
