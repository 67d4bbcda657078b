//! The control API of this daemon: its calls, what they are given and what they answer.

mod clones;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRef, State};
use axum::http::StatusCode;
use control::body::{Json, Path, Query};
use control::common::{self, Answer, Common, Fails, Force, Running, VERSION};
use control::moving::Placed;
use control::problem::Problem;
use control::refused::Refused;
use poll_engine::stats::{ERROR_KINDS, QueueStats, merge, percentile};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::exports::{Exports, Served};
use crate::limits::Limits;
use crate::spec::DiskSpec;

/// What all calls have.
#[derive(Clone)]
struct Api {
    exports: Arc<Exports>,
    common: Common,
}

impl FromRef<Api> for Common {
    fn from_ref(api: &Api) -> Common {
        api.common.clone()
    }
}

impl Api {
    /// Changes something.
    async fn change<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Exports) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Problem> {
        self.common.change(&self.exports, act).await
    }
}

/// The daemon.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Daemon {
    /// Its name.
    program: String,
    /// Its version.
    version: String,
    /// The version of this API.
    api: String,
    /// The number of its process.
    pid: u32,
    /// The file that it was started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    config: Option<String>,
    /// How reactors wait for requests.
    poll: String,
    /// How many disks it serves.
    disks: usize,
}

/// A disk.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::struct_excessive_bools)] // each by itself
struct Disk {
    /// What it is known by: its name, or the path of its socket.
    name: String,
    /// Where front ends connect.
    socket: String,
    /// What is served: a path, or ram or null.
    image: String,
    /// What the bytes of that mean: raw, qcow2 or vmdk.
    format: String,
    /// Size in bytes.
    bytes: u64,
    /// Logical block size in bytes.
    block_size: u32,
    /// Whether writes are refused.
    read_only: bool,
    /// Whether a front end is connected.
    attached: bool,
    /// Whether its queues are to take no requests.
    paused: bool,
    /// Whether no front end can come any more.
    ended: bool,
    /// The file that its requests are recorded to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    record: Option<String>,
    /// What all queues have done together.
    all: Counts,
}

/// A disk, and each of its queues.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
struct DiskDetail {
    #[serde(flatten)]
    disk: Disk,
    /// Its queues.
    queues: Vec<Queue>,
    /// The image that it is over, if it is over one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    backing: Option<String>,
    /// How far it is on its way to need none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    flattening: Option<clones::Flattening>,
}

/// A queue.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(clippy::struct_field_names)] // as it is called in calls
struct Queue {
    /// Its number.
    queue: u16,
    /// The number of the reactor that it runs on, if it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reactor: Option<usize>,
    /// What it has done.
    counts: Counts,
}

/// Counters, since the daemon has started; times are in nanoseconds.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Counts {
    /// Requests completed.
    requests: u64,
    /// Bytes read by the guest.
    read: u64,
    /// Bytes written by the guest.
    written: u64,
    /// Errors of any kind.
    errors: u64,
    /// Times that rings were looked at.
    polls: u64,
    /// Notifications taken from the guest.
    kicks: u64,
    /// Interrupts sent to the guest.
    signals: u64,
    /// Most requests ever in flight on one queue.
    peak: u64,
    /// Time that half of all requests took at most.
    p50_ns: u64,
    /// Time that 99 % took at most.
    p99_ns: u64,
    /// Time that 99.9 % took at most.
    p999_ns: u64,
    /// Longest time.
    max_ns: u64,
}

impl Counts {
    fn of(queues: &[Arc<QueueStats>]) -> Counts {
        let sum = |of: fn(&QueueStats) -> u64| queues.iter().map(|q| of(q)).sum::<u64>();
        let latency = merge(queues.iter().map(|q| q.latency.counts()));
        Counts {
            requests: sum(|q| q.requests.get()),
            read: sum(|q| q.bytes_read.get()),
            written: sum(|q| q.bytes_written.get()),
            errors: ERROR_KINDS
                .iter()
                .map(|(kind, _)| queues.iter().map(|q| q.errors(*kind)).sum::<u64>())
                .sum(),
            polls: sum(|q| q.polls.get()),
            kicks: sum(|q| q.kicks.get()),
            signals: sum(|q| q.signals.get()),
            peak: queues.iter().map(|q| q.in_flight_peak.get()).max().unwrap_or(0),
            p50_ns: percentile(&latency, 50.0),
            p99_ns: percentile(&latency, 99.0),
            p999_ns: percentile(&latency, 99.9),
            max_ns: percentile(&latency, 100.0),
        }
    }
}

impl From<&Served> for Disk {
    fn from(s: &Served) -> Disk {
        let spec = s.spec();
        let image = DiskSpec { name: None, ..spec.clone() }.title();
        Disk {
            name: s.key.clone(),
            socket: s.place.key(),
            image,
            format: spec.format().to_string(),
            bytes: s.disk.capacity(),
            block_size: s.disk.block_size(),
            read_only: s.is_read_only,
            attached: s.server.is_attached(),
            paused: s.server.is_paused(),
            ended: s.server.has_ended(),
            record: spec.record.map(|path| path.display().to_string()),
            all: Counts::of(&s.stats),
        }
    }
}

impl From<&Served> for DiskDetail {
    fn from(s: &Served) -> DiskDetail {
        let queue = |(number, stats): (u16, &Arc<QueueStats>)| Queue {
            queue: number,
            reactor: stats.reactor(),
            counts: Counts::of(std::slice::from_ref(stats)),
        };
        DiskDetail {
            disk: s.into(),
            queues: (0..).zip(&s.stats).map(queue).collect(),
            backing: clones::backing(s),
            flattening: clones::flattening(s),
        }
    }
}

/// A new size.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
struct Grow {
    /// Make the file this large first, in bytes, also with K, M, G or T behind. Without it the image is looked at only.
    #[schema(example = "20G", pattern = "^[0-9]+[KMGTkmgt]?$")]
    size: Option<String>,
}

/// A file.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Record {
    /// The file to be made.
    #[schema(value_type = String)]
    file: PathBuf,
}

/// All calls.
pub fn router(exports: Arc<Exports>) -> Router {
    let (router, document) = calls();
    let common = Common::new(Arc::clone(&exports) as _, &document);
    router.with_state(Api { exports, common })
}

fn calls() -> (Router<Api>, OpenApi) {
    let own = OpenApiRouter::new()
        .routes(routes!(daemon))
        .routes(routes!(list, add))
        .routes(routes!(show, remove))
        .routes(routes!(grow))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(record, end_record))
        .routes(routes!(clones::make))
        .routes(routes!(clones::pools))
        .routes(routes!(clones::flatten, clones::stop_flatten))
        .routes(routes!(limits, set_limits))
        .routes(routes!(place));
    let about = "Disks of a running vhost-blk: what they do, and what can be changed while guests run.";
    common::calls("vhost-blk", about, own)
}

/// What the daemon is
#[utoipa::path(get, path = "/v1/daemon", responses((status = 200, body = Daemon), Fails))]
async fn daemon(State(api): State<Api>) -> Json<Daemon> {
    Json(Daemon {
        program: "vhost-blk".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        api: VERSION.into(),
        pid: std::process::id(),
        config: api.exports.file().map(|path| path.display().to_string()),
        poll: api.exports.engine().pacing().name().into(),
        disks: api.exports.all().len(),
    })
}

/// All disks
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<Disk>), Fails))]
async fn list(State(api): State<Api>) -> Json<Vec<Disk>> {
    Json(api.exports.all().iter().map(|s| Disk::from(&**s)).collect())
}

/// Serves one more disk, with the keys of a [[disk]] of the configuration file
#[utoipa::path(post, path = "/v1/disks", request_body = DiskSpec, responses((status = 201, body = DiskDetail), Fails))]
async fn add(
    State(api): State<Api>,
    Json(spec): Json<DiskSpec>,
) -> Result<(StatusCode, Json<DiskDetail>), Problem> {
    let served = api.change(|exports| exports.add(spec)).await?;
    Ok((StatusCode::CREATED, Json((&*served).into())))
}

/// A disk and its queues
#[utoipa::path(get, path = "/v1/disks/{name}", params(("name" = String, Path)), responses((status = 200, body = DiskDetail), Fails))]
async fn show(State(api): State<Api>, Path(name): Path<String>) -> Answer<DiskDetail> {
    Ok(Json((&*api.exports.find(&name)?).into()))
}

/// Serves a disk no more, once what is in flight is finished
#[utoipa::path(delete, path = "/v1/disks/{name}", params(("name" = String, Path), Force), responses((status = 204), Fails))]
async fn remove(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(force): Query<Force>,
) -> Result<StatusCode, Problem> {
    api.change(move |exports| exports.remove(&name, force.force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Looks whether the image has grown, or makes it larger, and tells the guest
#[utoipa::path(post, path = "/v1/disks/{name}/grow", params(("name" = String, Path)), request_body = Option<Grow>, responses((status = 200, body = DiskDetail), Fails))]
async fn grow(State(api): State<Api>, Path(name): Path<String>, Json(to): Json<Grow>) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.grow(&name, to.size.as_deref())).await?;
    Ok(Json((&*served).into()))
}

/// Takes no requests for now; those in flight are finished
#[utoipa::path(post, path = "/v1/disks/{name}/pause", params(("name" = String, Path)), responses((status = 200, body = DiskDetail), Fails))]
async fn pause(State(api): State<Api>, Path(name): Path<String>) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.set_paused(&name, true)).await?;
    Ok(Json((&*served).into()))
}

/// Takes requests again
#[utoipa::path(post, path = "/v1/disks/{name}/resume", params(("name" = String, Path)), responses((status = 200, body = DiskDetail), Fails))]
async fn resume(State(api): State<Api>, Path(name): Path<String>) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.set_paused(&name, false)).await?;
    Ok(Json((&*served).into()))
}

/// Records requests to a new file from now on
#[utoipa::path(put, path = "/v1/disks/{name}/record", params(("name" = String, Path)), request_body = Record, responses((status = 200, body = DiskDetail), Fails))]
async fn record(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(to): Json<Record>,
) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.set_record(&name, Some(&to.file))).await?;
    Ok(Json((&*served).into()))
}

/// Records requests no more
#[utoipa::path(delete, path = "/v1/disks/{name}/record", params(("name" = String, Path)), responses((status = 200, body = DiskDetail), Fails))]
async fn end_record(State(api): State<Api>, Path(name): Path<String>) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.set_record(&name, None)).await?;
    Ok(Json((&*served).into()))
}

/// The limits of a disk
#[utoipa::path(get, path = "/v1/disks/{name}/limits", params(("name" = String, Path)), responses((status = 200, body = Limits), Fails))]
async fn limits(State(api): State<Api>, Path(name): Path<String>) -> Answer<Limits> {
    Ok(Json(api.exports.find(&name)?.disk.throttle().limits()))
}

/// Keeps a disk to these limits from now on, by their keys in the configuration file; what is not named has none
#[utoipa::path(put, path = "/v1/disks/{name}/limits", params(("name" = String, Path)), request_body = Limits, responses((status = 200, body = Limits), Fails))]
async fn set_limits(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(to): Json<Limits>,
) -> Answer<Limits> {
    let served = api.change(move |exports| exports.set_limits(&name, to)).await?;
    Ok(Json(served.disk.throttle().limits()))
}

/// Moves queues to a reactor, where they stay
#[utoipa::path(put, path = "/v1/disks/{name}/reactor", params(("name" = String, Path)), request_body = Placed, responses((status = 200, body = DiskDetail), Fails))]
async fn place(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(at): Json<Placed>,
) -> Answer<DiskDetail> {
    let served = api.change(move |exports| exports.place(&name, at)).await?;
    Ok(Json((&*served).into()))
}
