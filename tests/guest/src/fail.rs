//! How the guest ends when it cannot go on: with a report, on the shared pages and on the serial port.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::Ordering;

use kickless_guest::{EVENT_PORT, Fault, event, state};

use crate::cpu;
use crate::mailbox;

/// The first serial port: whatever else fails, somebody may read it.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::port_write_byte(0x3f8, byte));
        Ok(())
    }
}

struct Text<'a> {
    bytes: &'a mut [u8],
    used: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, from) in self.bytes[self.used..].iter_mut().zip(text.bytes()) {
            *to = from;
            self.used += 1;
        }
        Ok(())
    }
}

/// Reports an exception.
pub fn fault(frame: &Fault) -> ! {
    let _ = writeln!(Serial, "guest: exception {frame:x?}");
    if let Some(mailbox) = mailbox::shared() {
        // SAFETY: the shared pages are mapped; the harness reads the fault after it has seen the state.
        unsafe { (&raw mut (*mailbox.as_ptr()).fault).write_volatile(*frame) };
    }
    stop(state::FAULT)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "guest: {info}");
    if let Some(mailbox) = mailbox::shared() {
        // SAFETY: as above; a second panic may mix its text in, which is still text.
        let bytes = unsafe { &mut (*mailbox.as_ptr()).message };
        let _ = write!(Text { bytes, used: 0 }, "{info}");
    }
    stop(state::PANIC)
}

fn stop(why: u32) -> ! {
    if let Some(mailbox) = mailbox::shared() {
        // SAFETY: the shared pages are mapped.
        unsafe { &(*mailbox.as_ptr()).state }.store(why, Ordering::Release);
    }
    loop {
        cpu::port_write(EVENT_PORT, event::FAILED);
    }
}
