//! Calls that every daemon answers: its reactors, its file, its counters, and what all of its calls are.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRef, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use poll_engine::engine::Engine;
use poll_engine::engine::pacing::Pacing;
use serde::{Deserialize, Serialize};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa::{IntoParams, IntoResponses, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::body::{Json, Path};
use crate::metrics;
use crate::page;
use crate::problem::Problem;
use crate::refused::Refused;
use crate::server::Turn;
use crate::stats::{Export, Stats, now_ns};

/// Version of the calls.
pub const VERSION: &str = "v1";

/// What a call that returns JSON answers.
pub type Answer<T> = Result<Json<T>, Problem>;

/// A daemon that runs, as far as all are alike.
pub trait Running: Send + Sync + 'static {
    /// What runs the queues.
    fn engine(&self) -> &Engine;
    /// Starts a reactor more, on this CPU.
    fn add_reactor(&self, cpu: Option<usize>) -> Result<(), Refused>;
    /// Ends this one, once its queues have moved to others.
    fn retire(&self, number: usize) -> Result<(), Refused>;
    /// Has all reactors wait in this way.
    fn set_pacing(&self, pacing: Pacing) -> Result<(), Refused>;
    /// Writes what has changed into its file: that.
    fn save(&self) -> Result<PathBuf, Refused>;
    /// Has a newer process take over if one comes: the socket on which it is waited for.
    fn expect_successor(&self) -> Result<PathBuf, Refused>;
    /// All counters, for Prometheus.
    fn metrics(&self) -> String;
    /// What is served, for views.
    fn exports(&self) -> Vec<Export>;
}

/// What these calls work on; a part of what a program's own do.
#[derive(Clone)]
pub struct Common {
    running: Arc<dyn Running>,
    turn: Turn,
    document: Arc<str>,
    program: Arc<str>,
}

impl Common {
    /// Of a daemon whose calls the document has.
    pub fn new(running: Arc<dyn Running>, document: &OpenApi) -> Common {
        Common {
            running,
            turn: Turn::default(),
            document: document.to_json().unwrap_or_default().into(),
            program: document.info.title.as_str().into(),
        }
    }

    /// Changes something of `what`, when it is its turn.
    pub async fn change<W: Send + Sync + 'static, T: Send + 'static>(
        &self,
        what: &Arc<W>,
        act: impl FnOnce(&W) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Problem> {
        let what = Arc::clone(what);
        self.turn.take(move || Ok(act(&what)?)).await
    }

    async fn tell<T: Send + 'static>(
        &self,
        act: impl FnOnce(&dyn Running) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Problem> {
        let running = Arc::clone(&self.running);
        self.turn.take(move || Ok(act(&*running)?)).await
    }

    fn reactors(&self) -> Vec<Reactor> {
        let list = self.running.engine().list();
        list.iter().map(|r| Reactor { reactor: r.number, cpu: r.cpu, queues: r.queues }).collect()
    }
}

/// How calls fail.
#[derive(IntoResponses)]
#[allow(dead_code)] // for the document
pub enum Fails {
    /// The call says something that cannot be: which key, and why
    #[response(status = 400, content_type = "application/problem+json")]
    Bad(Problem),
    /// Somebody who may not use the API
    #[response(status = 403, content_type = "application/problem+json")]
    Forbidden(Problem),
    /// There is nothing of this name
    #[response(status = 404, content_type = "application/problem+json")]
    Missing(Problem),
    /// It cannot be done as things are
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(Problem),
}

/// Whether to remove something that is in use.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Force {
    /// Also if a front end is connected, which is hung up on.
    #[param(required = false)]
    pub force: bool,
}

/// A reactor.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(clippy::struct_field_names)] // as it is called in calls
pub struct Reactor {
    /// Its number, which no other one ever has.
    reactor: usize,
    /// The CPU that it is pinned to, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    cpu: Option<usize>,
    /// How many queues run on it.
    queues: usize,
}

/// A reactor to be.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NewReactor {
    /// The CPU to pin it to; without it, it runs where the kernel puts it.
    cpu: Option<usize>,
}

/// A way of waiting.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Poll {
    /// busy, adaptive or event.
    #[schema(pattern = "^(busy|adaptive|event)$")]
    poll: String,
}

/// Where something was saved.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The file.
    file: String,
}

/// How a newer process takes over: the same program with the same options, but for what is to be new.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Succession {
    /// What its --takeover is to be.
    pub socket: String,
    /// The file of the program that runs, or what is in its place by now.
    pub program: String,
    /// The options that this process was started with.
    pub options: Vec<String>,
    /// The directory that it was started in.
    pub directory: String,
}

impl Succession {
    /// On this socket, from this process.
    fn on(socket: &std::path::Path) -> io::Result<Succession> {
        let program = std::env::current_exe()?.display().to_string();
        // How the kernel marks a file that was replaced.
        let program = program.strip_suffix(" (deleted)").unwrap_or(&program).to_owned();
        Ok(Succession {
            socket: socket.display().to_string(),
            program,
            options: std::env::args_os().skip(1).map(|option| option.to_string_lossy().into()).collect(),
            directory: std::env::current_dir()?.display().to_string(),
        })
    }
}

/// All calls of a program: these and its own; and the document that describes them.
pub fn calls<S: Clone + Send + Sync + 'static>(
    title: &str,
    about: &str,
    own: OpenApiRouter<S>,
) -> (Router<S>, OpenApi)
where
    Common: FromRef<S>,
{
    let info = InfoBuilder::new().title(title).version(VERSION).description(Some(about));
    // What is only in answers of calls that fail is not found by itself.
    let components = ComponentsBuilder::new().schema_from::<Problem>().build();
    let document = OpenApiBuilder::new().info(info.build()).components(Some(components)).build();
    OpenApiRouter::with_openapi(document)
        .routes(routes!(openapi))
        .routes(routes!(reactors, add_reactor))
        .routes(routes!(retire))
        .routes(routes!(poll, set_poll))
        .routes(routes!(save))
        .routes(routes!(expect_successor))
        .routes(routes!(metrics_text))
        .routes(routes!(all_stats))
        .merge(own)
        .merge(page::router().into())
        .split_for_parts()
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, body = serde_json::Value)))]
async fn openapi(State(common): State<Common>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], common.document.to_string()).into_response()
}

/// All reactors
#[utoipa::path(get, path = "/v1/reactors", responses((status = 200, body = Vec<Reactor>), Fails))]
async fn reactors(State(common): State<Common>) -> Json<Vec<Reactor>> {
    Json(common.reactors())
}

/// Starts a reactor more: all there are then
#[utoipa::path(post, path = "/v1/reactors", request_body = Option<NewReactor>, responses((status = 201, body = Vec<Reactor>), Fails))]
async fn add_reactor(
    State(common): State<Common>,
    Json(new): Json<NewReactor>,
) -> Result<(StatusCode, Json<Vec<Reactor>>), Problem> {
    common.tell(move |running| running.add_reactor(new.cpu)).await?;
    Ok((StatusCode::CREATED, Json(common.reactors())))
}

/// Ends a reactor, once its queues have moved to others
#[utoipa::path(delete, path = "/v1/reactors/{number}", params(("number" = usize, Path)), responses((status = 204), Fails))]
async fn retire(State(common): State<Common>, Path(number): Path<usize>) -> Result<StatusCode, Problem> {
    common.tell(move |running| running.retire(number)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How reactors wait for work
#[utoipa::path(get, path = "/v1/poll", responses((status = 200, body = Poll), Fails))]
async fn poll(State(common): State<Common>) -> Json<Poll> {
    Json(Poll { poll: common.running.engine().pacing().name().into() })
}

/// Has reactors wait in another way
#[utoipa::path(put, path = "/v1/poll", request_body = Poll, responses((status = 200, body = Poll), Fails))]
async fn set_poll(State(common): State<Common>, Json(to): Json<Poll>) -> Answer<Poll> {
    let pacing: Pacing = to.poll.parse().map_err(|why: String| Problem::bad(why).at("poll"))?;
    common.tell(move |running| running.set_pacing(pacing)).await?;
    Ok(Json(Poll { poll: pacing.name().into() }))
}

/// Writes what has changed into the configuration file
#[utoipa::path(post, path = "/v1/save", responses((status = 200, body = Saved), Fails))]
async fn save(State(common): State<Common>) -> Answer<Saved> {
    let file = common.tell(<dyn Running>::save).await?;
    Ok(Json(Saved { file: file.display().to_string() }))
}

/// Has a newer process take over if one comes, and says how it is started; until then everything goes on
#[utoipa::path(post, path = "/v1/takeover", responses((status = 200, body = Succession), Fails))]
async fn expect_successor(State(common): State<Common>) -> Answer<Succession> {
    let how = |running: &dyn Running| {
        let socket = running.expect_successor()?;
        Succession::on(&socket).map_err(|e| Refused::Conflict(format!("cannot say what was started: {e}")))
    };
    Ok(Json(common.tell(how).await?))
}

/// All counters, for Prometheus
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "application/openmetrics-text"), Fails))]
async fn metrics_text(State(common): State<Common>) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], common.running.metrics()).into_response()
}

/// All that a view needs: what reactors, exports and queues have done
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = Stats), Fails))]
async fn all_stats(State(common): State<Common>) -> Json<Stats> {
    let engine = common.running.engine();
    Json(Stats {
        program: common.program.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        now_ns: now_ns(),
        poll: engine.pacing().name().into(),
        reactors: engine.list().iter().map(Into::into).collect(),
        exports: common.running.exports(),
    })
}
