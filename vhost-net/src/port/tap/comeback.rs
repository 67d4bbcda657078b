//! A tap that was deleted and is made anew: whoever had its queues goes on with those of the new one.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, Weak};
use std::time::Duration;

use poll_engine::confine::{self, Role};
use tracing::{info, warn};

use super::{Tap, flags, offload, sys};
use crate::header::HEADER;
use crate::port::interface::index_of;

/// Between two looks whether there is one of its name.
const PAUSE: Duration = Duration::from_millis(200);

/// Waits on a thread of its own for as long as there is somebody to wait for.
pub(super) fn wait(tap: Weak<Tap>) -> io::Result<()> {
    let look = move || {
        let mut told = false;
        loop {
            std::thread::sleep(PAUSE);
            let Some(tap) = tap.upgrade() else { return };
            let Some(index) = index_of(&tap.name) else { continue };
            match tap.come_back(index) {
                Ok(()) => return,
                Err(e) if !told => {
                    told = true;
                    warn!("tap {} is there again and cannot be used: {e}; trying on", tap.name);
                }
                Err(_) => {}
            }
        }
    };
    confine::post("tap-return", Role::Opener, look)
}

impl Tap {
    fn come_back(&self, index: u32) -> io::Result<()> {
        let is_multi_queue = self.pairs.len() > 1;
        let attach = |flags| -> io::Result<_> {
            let tun = sys::open_tun()?;
            sys::attach(tun.as_fd(), &self.name, flags)?;
            Ok(tun)
        };
        // One queue may be that of a tap which could have several.
        let attach = |_| {
            attach(flags(is_multi_queue))
                .or_else(|e| if is_multi_queue { Err(e) } else { attach(flags(true)) })
        };
        let tuns = (0..self.pairs.len()).map(attach).collect::<Result<Vec<_>, _>>()?;
        // If it went in between, attaching has made another one, which goes with its queues.
        if index_of(&self.name) != Some(index) {
            return Err(io::Error::other("it has gone once more"));
        }
        sys::set_header(tuns[0].as_fd(), HEADER)?;
        sys::set_offload(tuns[0].as_fd(), offload(self.features.load(Ordering::Relaxed)))?;
        if !self.carrier.load(Ordering::Relaxed) {
            sys::set_carrier(tuns[0].as_fd(), false)?;
        }
        for (tun, pair) in tuns.iter().zip(&self.pairs) {
            let running = pair.running.lock().unwrap_or_else(PoisonError::into_inner);
            if is_multi_queue && *running == 0 {
                sys::use_queue(tun.as_fd(), false)?;
            }
            sys::replace(tun.as_fd(), pair.tun.as_fd())?;
        }
        self.gone.store(false, Ordering::Relaxed);
        info!("tap {} is there again", self.name);
        self.tell();
        Ok(())
    }
}
