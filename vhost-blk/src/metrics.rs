//! What this daemon has done: for Prometheus, and for views of it. Names and labels are documented (docs/control.md), and
//! stay as they are.

use control::common::Running;
use control::metrics::{self, Build, Gauges, Queues, Reactors};
use control::stats::{Export, QueueCounts};
use prometheus_client::registry::Unit;

use crate::exports::{Exports, Served};

/// All counters as text.
pub fn text(exports: &Exports) -> String {
    let disks = exports.all();
    let each = |of: fn(&Served) -> u64| disks.iter().map(|s| (s.key.clone(), of(s))).collect();
    let gauges = vec![
        ("capacity", "Size of the disk", Some(Unit::Bytes), each(|s| s.disk.capacity())),
        ("attached", "Whether a front end is connected", None, each(|s| s.server.is_attached().into())),
        (
            "cluster_waiting",
            "Requests that wait for a storage cluster",
            None,
            each(|s| s.disk.waits().unwrap_or_default().0),
        ),
        (
            "cluster_stalls",
            "Times that a storage cluster has not answered for 5 s",
            None,
            each(|s| s.disk.waits().unwrap_or_default().1),
        ),
        ("paused", "Whether queues take no requests", None, each(|s| s.server.is_paused().into())),
    ];
    let queues = disks.iter().map(|s| (s.key.clone(), s.stats.clone())).collect();
    metrics::text(
        "vhost_blk",
        vec![
            Box::new(Build(env!("CARGO_PKG_VERSION"))),
            Box::new(Queues { label: "disk", all: queues }),
            Box::new(Gauges { label: "disk", all: gauges }),
            Box::new(Reactors(exports.engine().list())),
        ],
    )
}

/// What is served, for views.
pub fn views(exports: &Exports) -> Vec<Export> {
    let export = |s: &Served| Export {
        name: s.key.clone(),
        attached: s.server.is_attached(),
        paused: s.server.is_paused(),
        queues: (0..).zip(&s.stats).map(|(number, queue)| QueueCounts::of(number, queue)).collect(),
        ..Export::default()
    };
    exports.all().iter().map(|s| export(s)).collect()
}
