//! What goes wrong with the new daemon is no trouble of the guest's.
