//! Sessions to snapshots and back. Every structure is taken apart field by field, so that one that gets a new field does
//! not compile until it is decided what becomes of it here.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use super::{
    Descriptors, FdIndex, HandoverError, InflightState, ServedState, ServerState, SlotState, Snapshot,
};
use crate::memory::log::DirtyLog;
use crate::memory::map::Region;
use crate::memory::{MemoryMap, RegionSpec};
use crate::ring::RingConfig;
use crate::ring::inflight::InflightMemory;
use crate::session::inflight::Inflight;
use crate::session::listen::Listener;
use crate::session::logging::{Logging, Logs};
use crate::session::serve::{Export, QueueParts, Served, Slot};
use crate::session::server::Control;
use crate::session::socket::{Connection, Partial};
use crate::session::state::{Offer, Postcopy, QueueState, Session, SessionState, TRANSPORT_FEATURES};

/// Bytes of configuration space that are compared: all that the protocol can show.
const CONFIG_SPACE: usize = 256;

impl Snapshot {
    /// Of a server without a front end.
    pub(in crate::session) fn idle(listener: &Listener) -> io::Result<Snapshot> {
        let mut fds = Descriptors::default();
        let state = ServerState { listener: listener.save(&mut fds)?, session: None };
        Ok(Snapshot { state, fds })
    }
}

impl Session {
    fn save(&self) -> SessionState {
        // Whoever saves has looked that no guest comes before its memory.
        let Session { offer: _, features, protocol, has_channel, status, queues, logging, postcopy: _ } =
            self;
        let (features, protocol, status) = (*features, *protocol, *status);
        let (queues, logging) = (queues.clone(), logging.clone());
        SessionState { features, protocol, has_channel: *has_channel, status, queues, logging }
    }

    fn restore(offer: Offer, state: SessionState) -> Result<Session, HandoverError> {
        let SessionState { features, protocol, has_channel, status, mut queues, mut logging } = state;
        let beyond = features.unwrap_or(0) & !(offer.features | TRANSPORT_FEATURES);
        let beyond = beyond | protocol & !offer.protocol_features();
        if beyond != 0 {
            return Err(HandoverError::Features(beyond));
        }
        let most = [
            ("queues", queues.len() as u64, u64::from(offer.num_queues)),
            (
                "rings of",
                queues.iter().map(|q| u64::from(q.num)).max().unwrap_or(0),
                u64::from(offer.max_ring_size),
            ),
        ];
        for (what, used, most) in most {
            if used > most {
                return Err(HandoverError::Limit { what, used, most });
            }
        }
        queues.resize_with(offer.num_queues.into(), QueueState::default);
        logging.resize_with(offer.num_queues.into(), Logging::default);
        let postcopy = Postcopy::Off;
        Ok(Session { offer, features, protocol, has_channel, status, queues, logging, postcopy })
    }
}

impl Served<'_> {
    /// Stops the queues, and remembers where they are, for [`go_on`](Self::go_on).
    pub(in crate::session) fn pause(&mut self) -> io::Result<()> {
        let stopping = (0u16..).zip(&mut self.slots).filter_map(|(i, slot)| {
            let (queue, _) = slot.running.take()?;
            Some((i, queue.begin_stop()))
        });
        // All at once, then each awaited.
        for (index, queue) in stopping.collect::<Vec<_>>() {
            self.session.stopped(index, queue.wait()?);
        }
        Ok(())
    }

    /// Stops the queues, and describes everything.
    pub(in crate::session) fn save(&mut self, listener: &Listener) -> io::Result<Snapshot> {
        if self.postcopy.is_some() {
            return Err(io::Error::other(
                "a guest is on its way here (post-copy); try again when all of it has come",
            ));
        }
        self.pause()?;
        let Served {
            export,
            connection,
            session,
            map,
            // Translations are asked for again: what becomes invalid meanwhile is told to nobody.
            iommu,
            released: _,
            slots,
            // Looked at before we came here, and raised again when a queue breaks again.
            alarm: _,
            inflight,
            // Goes with a reply, and none is due between two requests.
            reply_fd: _,
            logs: Logs { log, call: log_call, queues: logging },
            backend_channel,
            // The front end hears that it failed, and its guest stays where it is.
            transfer: _,
            complaints,
            orders: _,
            postcopy: _,
            mapped: _,
            repeats,
        } = self;
        let mut fds = Descriptors::default();
        let (stream, Partial { bytes, fds: partial_fds }) = connection.parts();
        let no_file = || io::Error::other("shared memory without a file");
        let slot = |fds: &mut Descriptors, slot: &Slot| {
            let Slot { kick, call, err, running: _, unmapped: _, base_is_known: _ } = slot;
            let (kick, call) = (fds.put_opt(kick.as_ref())?, fds.put_opt(call.as_ref())?);
            io::Result::Ok(SlotState { kick, call, err: fds.put_opt(err.as_ref())? })
        };
        let region = |fds: &mut Descriptors, region: &Region| {
            let file = region.file().ok_or_else(no_file)?;
            io::Result::Ok((*region.spec(), fds.put_opt(Some(file))?.ok_or_else(no_file)?))
        };
        let mut config = vec![0; CONFIG_SPACE];
        export.device.read_config(0, &mut config);
        let served = ServedState {
            stream: fds.put(stream.as_fd())?,
            partial: bytes.clone(),
            partial_fds: partial_fds.iter().map(|fd| fds.put(fd.as_fd())).collect::<Result<_, _>>()?,
            session: session.save(),
            config,
            state: export.device.save_state(),
            regions: map.regions().iter().map(|r| region(&mut fds, r)).collect::<Result<_, _>>()?,
            slots: slots.iter().map(|s| slot(&mut fds, s)).collect::<Result<_, _>>()?,
            inflight: match inflight {
                Inflight::Off => InflightState::Off,
                Inflight::Lost => InflightState::Lost,
                Inflight::On(memory) => {
                    let (spec, file) = memory.source();
                    InflightState::On(spec, fds.put_opt(file)?.ok_or_else(no_file)?)
                }
            },
            log: log.as_ref().map(|log| region(&mut fds, log.region())).transpose()?,
            log_call: fds.put_opt(log_call.as_deref())?,
            logging: logging.clone(),
            backend_channel: fds.put_opt(backend_channel.as_ref())?,
            iommu: iommu.save(),
            complaints: *complaints,
            repeats: repeats.clone(),
        };
        let state = ServerState { listener: listener.save(&mut fds)?, session: Some(served) };
        Ok(Snapshot { state, fds })
    }

    /// Starts again what [`pause`](Self::pause) or [`save`](Self::save) has stopped.
    pub(in crate::session) fn go_on(&mut self) {
        for (index, config) in self.stopped() {
            self.start_or_complain(index, |served| {
                let translated = served.session.has_iotlb();
                if translated { served.start_translated(index, config) } else { served.start(index, config) }
            });
        }
    }

    /// Queues that should run and do not.
    fn stopped(&self) -> Vec<(u16, RingConfig)> {
        let queues = (0u16..).zip(self.session.queues.iter().zip(&self.slots));
        queues.filter_map(|(i, (q, slot))| Some((i, q.running.filter(|_| slot.running.is_none())?))).collect()
    }
}

/// A session and the queues that it is to start.
type Prepared<'a> = (Served<'a>, Vec<(u16, RingConfig, QueueParts)>);

/// A server with everything done that can fail.
pub(in crate::session) struct Restored<'a> {
    listener: Listener,
    /// The socket file that is ours to remove once we serve.
    made: Option<(PathBuf, u64)>,
    served: Option<Prepared<'a>>,
}

impl<'a> Restored<'a> {
    /// One of our own.
    pub(in crate::session) fn fresh(listener: Listener) -> Restored<'a> {
        Restored { listener, made: None, served: None }
    }

    /// That of another process. Touches nothing that is shared: the other one may still go on itself.
    pub(in crate::session) fn new(
        export: &'a Export,
        control: &Control,
        snapshot: Snapshot,
    ) -> Result<Restored<'a>, HandoverError> {
        let Snapshot { state: ServerState { listener, session }, mut fds } = snapshot;
        let made = listener.made.clone();
        let listener = Listener::restore(&listener, &mut fds)?;
        let served = session.map(|state| served(export, control, state, &mut fds)).transpose()?;
        Ok(Restored { listener, made, served })
    }

    /// Whether a front end comes with it.
    pub(in crate::session) fn has_session(&self) -> bool {
        self.served.is_some()
    }

    /// Serves, from here on.
    pub(in crate::session) fn activate(self) -> (Listener, Option<Served<'a>>) {
        let Restored { mut listener, made, served } = self;
        if made.is_some() {
            listener.own(made);
        }
        let served = served.map(|(mut served, queues)| {
            for (index, config, parts) in queues {
                served.start_or_complain(index, |served| {
                    if served.session.has_iotlb() {
                        // It is made when its ring is translated.
                        drop(parts);
                        return served.start_translated(index, config);
                    }
                    served.run_queue(index, config, parts)
                });
            }
            served
        });
        (listener, served)
    }
}

fn served<'a>(
    export: &'a Export,
    control: &Control,
    state: ServedState,
    fds: &mut Descriptors,
) -> Result<Prepared<'a>, HandoverError> {
    let ServedState {
        stream,
        partial,
        partial_fds,
        session,
        config,
        state,
        regions,
        slots,
        inflight,
        log,
        log_call,
        logging,
        backend_channel,
        iommu,
        complaints,
        repeats,
    } = state;
    // First of all: what it says about the options is worth more than that feature bits differ.
    let load = |state: Vec<u8>| export.device.load_state(&state).map_err(|e| e.to_string());
    state.map_or(Ok(()), load).map_err(HandoverError::Device)?;
    export.device.adopt_config(&config).map_err(HandoverError::Device)?;
    let session = Session::restore(export.offer(), session)?;
    let partial_fds = partial_fds.into_iter().map(|at| fds.take(at)).collect::<Result<_, _>>()?;
    let partial = Partial { bytes: partial, fds: partial_fds };
    let connection = Connection::resume(UnixStream::from(fds.take(stream)?), partial)?;
    let mut served = Served::new(export, connection, control);
    served.session = session;
    let mut mapped = Vec::new();
    for (spec, at) in regions {
        mapped.push(Arc::new(Region::map(spec, fds.take(at)?)?));
    }
    served.map = Arc::new(MemoryMap::new(mapped)?);
    for (slot, state) in served.slots.iter_mut().zip(slots) {
        let SlotState { kick, call, err } = state;
        let (kick, call, err) = (fds.take_opt(kick)?, fds.take_opt(call)?, fds.take_opt(err)?);
        *slot = Slot { kick, call, err, ..Slot::default() };
    }
    served.inflight = match inflight {
        InflightState::Off => Inflight::Off,
        InflightState::Lost => Inflight::Lost,
        InflightState::On(spec, at) => Inflight::On(InflightMemory::map(spec, fds.take(at)?)?),
    };
    let map_log = |(spec, at): (RegionSpec, FdIndex), fds: &mut Descriptors| {
        let log = DirtyLog::map(fds.take(at)?, spec.mmap_offset, spec.size);
        log.map(Arc::new).map_err(|e| HandoverError::Log(e.to_string()))
    };
    served.logs = Logs {
        log: log.map(|log| map_log(log, fds)).transpose()?,
        call: fds.take_opt(log_call)?.map(Arc::new),
        queues: logging,
    };
    served.backend_channel = fds.take_opt(backend_channel)?;
    served.iommu.restore(iommu);
    served.complaints = complaints;
    served.repeats = repeats;
    let mut queues = Vec::new();
    for (index, config) in served.stopped() {
        let parts = served.queue_parts(index, &config).map_err(|e| HandoverError::Queue(e.to_string()))?;
        queues.push((index, config, parts));
    }
    Ok((served, queues))
}
