//! What the kernel says no with.

use std::{fmt, io};

/// What the kernel said to something that was asked of it.
#[derive(Debug)]
pub struct Refused {
    /// The error.
    pub error: io::Error,
    /// In more words, by netlink's extended acknowledgement.
    pub said: Option<String>,
}

impl Refused {
    /// One with nothing but an error number.
    pub fn errno(errno: i32) -> Refused {
        io::Error::from_raw_os_error(errno).into()
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused { error, said: None }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without Rust's " (os error 16)".
        let error = self.error.to_string();
        let error = error.split(" (os error").next().unwrap_or_default();
        match &self.said {
            Some(said) => write!(f, "{error}: {said}"),
            None => f.write_str(error),
        }
    }
}

impl std::error::Error for Refused {}
