//! What two processes tell each other of a port when one takes over from the other.
//!
//! What a driver has asked for goes along as its device's state. What a switch has learnt stays behind: the first packet to each address goes to all ports, as after a start.

use daemon::takeover::ClaimError;
use poll_engine::takeover::give::Program;
use serde::{Deserialize, Serialize};

use crate::hub::Plan;

/// This program, to its next version.
pub const PROGRAM: Program = Program { name: "vhost-net", version: env!("CARGO_PKG_VERSION") };

/// What a port is joined to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum About {
    /// Other ports, by a switch.
    Switch,
    /// Another port.
    Wire,
    /// Nothing.
    Loopback,
}

impl From<Plan> for About {
    fn from(plan: Plan) -> About {
        match plan {
            Plan::Switch => About::Switch,
            Plan::Wire => About::Wire,
            Plan::Echo | Plan::Discard | Plan::Generate(_) => About::Loopback,
        }
    }
}

impl About {
    fn words(self) -> &'static str {
        match self {
            About::Switch => "a port of a switch",
            About::Wire => "an end of a wire",
            About::Loopback => "a loopback",
        }
    }

    /// Fails unless this, which another process serves at `key`, is what this one is to serve.
    pub fn expect(self, key: &str, ours: About) -> Result<(), ClaimError> {
        if self == ours {
            return Ok(());
        }
        let (theirs, ours) = (self.words().into(), ours.words().into());
        Err(ClaimError::Kind { key: key.into(), theirs, ours })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_stays_joined_to_what_it_was() {
        About::from(Plan::Generate(60)).expect("/a", Plan::Echo.into()).unwrap();
        let refused = About::Switch.expect("/a", About::Wire).unwrap_err().to_string();
        assert!(
            refused.contains("a port of a switch on /a") && refused.contains("an end of a wire"),
            "{refused}"
        );
    }
}
