//! The device status field (virtio 1.3, 2.1), which front ends keep with us by `SET_STATUS` and read by `GET_STATUS`.

use serde::{Deserialize, Serialize};

/// `DRIVER_OK`: the driver is ready to drive the device.
pub const DRIVER_OK: u8 = 4;
/// `FEATURES_OK`: the features are agreed on.
pub const FEATURES_OK: u8 = 8;
/// `DEVICE_NEEDS_RESET`: the device cannot go on.
pub const NEEDS_RESET: u8 = 64;

/// The status of one device.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    bits: u8,
    /// The last `SET_FEATURES` was taken: without that there is nothing to agree on.
    features_taken: bool,
}

impl Status {
    /// As `GET_STATUS` answers.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// A `SET_FEATURES` was taken, or refused.
    pub fn features(&mut self, taken: bool) {
        self.features_taken = taken;
    }

    /// A driver's write other than 0. It re-reads `FEATURES_OK` to learn whether its features are acceptable (3.1.1,
    /// step 6), and `NEEDS_RESET` is the device's: only a reset clears it.
    pub fn set(&mut self, bits: u8) {
        self.bits = bits & !NEEDS_RESET | self.bits & NEEDS_RESET;
        if !self.features_taken {
            self.bits &= !FEATURES_OK;
        }
    }

    /// The device cannot go on; true when that is news for a driver that is to be told (2.1.2: "if DRIVER_OK is set,
    /// [...] the device MUST send a device configuration change notification").
    pub fn need_reset(&mut self) -> bool {
        let news = self.bits & NEEDS_RESET == 0;
        self.bits |= NEEDS_RESET;
        news && self.bits & DRIVER_OK != 0
    }

    /// Back to 0. What features were taken is for the transport to forget.
    pub fn reset(&mut self) {
        self.bits = 0;
    }

    /// Whether queues must rest: 2.1.2, "The device MUST NOT consume buffers [...] before DRIVER_OK". A front end that
    /// has not said a word of the status since the last reset is not held to it: its kick descriptors say enough.
    pub fn holds_queues(self) -> bool {
        self.bits & !NEEDS_RESET != 0 && self.bits & DRIVER_OK == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_agreed_on_only_when_they_were_taken() {
        let mut status = Status::default();
        status.set(1 | 2 | FEATURES_OK);
        assert_eq!(status.bits(), 3);
        status.features(true);
        status.set(1 | 2 | FEATURES_OK);
        assert_eq!(status.bits(), 11);
        status.features(false);
        status.set(1 | 2 | FEATURES_OK | DRIVER_OK);
        assert_eq!(status.bits(), 7);
    }

    #[test]
    fn queues_rest_between_the_first_word_and_driver_ok() {
        let mut status = Status::default();
        assert!(!status.holds_queues());
        status.set(1);
        assert!(status.holds_queues());
        status.set(1 | 2 | DRIVER_OK);
        assert!(!status.holds_queues());
        status.reset();
        assert!(!status.holds_queues());
    }

    #[test]
    fn only_a_reset_clears_needs_reset() {
        let mut status = Status::default();
        status.set(NEEDS_RESET);
        assert_eq!(status.bits(), 0, "the driver cannot set it");
        assert!(!status.need_reset(), "nobody to tell before DRIVER_OK");
        status.set(15);
        assert_eq!(status.bits(), 7 | NEEDS_RESET);
        assert!(!status.need_reset(), "no news");
        status.reset();
        status.set(7);
        assert!(status.need_reset());
        assert!(!status.need_reset());
    }
}
