//! libcryptsetup, as far as a volume is opened by it: its header, its key slots, its key.
//!
//! It is loaded when it is needed, so that whoever has no volumes does without. That makes code out of memory, and its
//! crypto library does so once more when it is first used: what is confined may do neither, so [`load`] comes before.
#![allow(unsafe_code)] // calls of a C library

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};

use libloading::Library;
use rustix::fs::{MemfdFlags, memfd_create};

/// The library, by the version of its interface.
const NAME: &str = "libcryptsetup.so.12";
/// `CRYPT_ANY_SLOT`.
const ANY_SLOT: c_int = -1;
/// `CRYPT_LOG_ERROR`.
const LOG_ERROR: c_int = 1;

type Log = unsafe extern "C" fn(level: c_int, message: *const c_char, context: *mut c_void);

/// libcryptsetup.h, what we use of it.
struct Calls {
    init: unsafe extern "C" fn(*mut *mut c_void, *const c_char) -> c_int,
    free: unsafe extern "C" fn(*mut c_void),
    set_log_callback: unsafe extern "C" fn(*mut c_void, Option<Log>, *mut c_void),
    load: unsafe extern "C" fn(*mut c_void, *const c_char, *mut c_void) -> c_int,
    dump_json: unsafe extern "C" fn(*mut c_void, *mut *const c_char, u32) -> c_int,
    volume_key_size: unsafe extern "C" fn(*mut c_void) -> c_int,
    volume_key_get:
        unsafe extern "C" fn(*mut c_void, c_int, *mut c_char, *mut usize, *const c_char, usize) -> c_int,
}

/// Loads it, once. Again costs nothing.
///
/// # Errors
/// What the loader says: it is not installed, mostly.
pub fn load() -> Result<(), String> {
    static USED: Once = Once::new();
    let calls = calls()?;
    // What it loads itself, it loads for the first header that it is shown, whatever that is.
    USED.call_once(|| {
        if let Ok(blank) = memfd_create("luks", MemfdFlags::CLOEXEC) {
            drop(Device::new(calls, &File::from(blank)).and_then(|mut device| device.load()));
        }
    });
    Ok(())
}

fn calls() -> Result<&'static Calls, String> {
    static LOADED: OnceLock<Result<Calls, String>> = OnceLock::new();
    LOADED.get_or_init(|| find().map_err(|e| e.to_string())).as_ref().map_err(Clone::clone)
}

fn find() -> Result<Calls, libloading::Error> {
    // SAFETY: by this name it is the library that it says, which does nothing harmful as it is loaded.
    let library = unsafe { Library::new(NAME) }?;
    // SAFETY: the types are those of libcryptsetup.h of this version, whose symbols do not change, and the library stays
    // loaded.
    let calls = unsafe {
        let no_plugins: unsafe extern "C" fn() = *library.get(b"crypt_token_external_disable\0")?;
        // A header names tokens, and tokens name libraries.
        no_plugins();
        Calls {
            init: *library.get(b"crypt_init\0")?,
            free: *library.get(b"crypt_free\0")?,
            set_log_callback: *library.get(b"crypt_set_log_callback\0")?,
            load: *library.get(b"crypt_load\0")?,
            dump_json: *library.get(b"crypt_dump_json\0")?,
            volume_key_size: *library.get(b"crypt_get_volume_key_size\0")?,
            volume_key_get: *library.get(b"crypt_volume_key_get\0")?,
        }
    };
    std::mem::forget(library);
    Ok(calls)
}

/// A call has failed: by this, and what the library has said about it.
#[derive(Debug, thiserror::Error)]
#[error("{error}{said}")]
pub struct Failed {
    /// What it was.
    pub error: io::Error,
    said: String,
}

/// The last error that the library has told of.
#[derive(Default)]
struct Said(String);

/// A file with a header.
pub struct Device {
    calls: &'static Calls,
    handle: NonNull<c_void>,
    said: Box<Said>,
    /// The library knows no threads.
    _alone: MutexGuard<'static, ()>,
}

impl Device {
    /// On this file, which stays open and has /proc lead to it.
    pub fn of(file: &File) -> Result<Device, Failed> {
        let said = String::new();
        Device::new(calls().map_err(|e| Failed { error: io::Error::other(e), said })?, file)
    }

    fn new(calls: &'static Calls, file: &File) -> Result<Device, Failed> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let name = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
        let mut handle = null_mut();
        // SAFETY: room for a handle, and a name that ends with a zero.
        let done = unsafe { (calls.init)(&raw mut handle, name.as_ptr()) };
        let Some(handle) = NonNull::new(handle).filter(|_| done == 0) else {
            let error = io::Error::from_raw_os_error(-done);
            return Err(Failed { error, said: format!(" ({})", name.to_string_lossy()) });
        };
        let mut device = Device { calls, handle, said: Box::default(), _alone: alone };
        let context: *mut Said = &raw mut *device.said;
        // SAFETY: what is said goes to a place that stays there, in its box, for as long as the handle is.
        unsafe { (calls.set_log_callback)(handle.as_ptr(), Some(note), context.cast()) };
        Ok(device)
    }

    fn result(&mut self, result: c_int) -> Result<u32, Failed> {
        u32::try_from(result).map_err(|_| {
            let said = std::mem::take(&mut self.said.0);
            let said = if said.is_empty() { said } else { format!(" ({})", said.trim_end_matches('.')) };
            Failed { error: io::Error::from_raw_os_error(-result), said }
        })
    }

    /// Reads a LUKS2 header.
    pub fn load(&mut self) -> Result<(), Failed> {
        // SAFETY: a handle, a type as text, and no parameters.
        let done = unsafe { (self.calls.load)(self.handle.as_ptr(), c"LUKS2".as_ptr(), null_mut()) };
        self.result(done).map(drop)
    }

    /// What the header says, in JSON. It has been loaded.
    pub fn json(&mut self) -> Result<String, Failed> {
        let mut json = std::ptr::null();
        // SAFETY: a handle, and room for a pointer.
        let done = unsafe { (self.calls.dump_json)(self.handle.as_ptr(), &raw mut json, 0) };
        self.result(done)?;
        if json.is_null() {
            return self.result(-libc::EINVAL).map(|_| String::new());
        }
        // SAFETY: a text that ends with a zero, which the handle keeps until the next call.
        Ok(unsafe { CStr::from_ptr(json) }.to_string_lossy().into_owned())
    }

    /// Bytes of the volume's key. The header has been loaded.
    pub fn volume_key_size(&mut self) -> Result<u32, Failed> {
        // SAFETY: a handle.
        let size = unsafe { (self.calls.volume_key_size)(self.handle.as_ptr()) };
        self.result(size)
    }

    /// The volume's key, out of whichever slot `key` opens. That takes as long as the slot has it take.
    pub fn volume_key(&mut self, key: &[u8], into: &mut [u8]) -> Result<(), Failed> {
        let mut size = into.len();
        // SAFETY: a handle; room for `size` bytes; `key.len()` bytes.
        let slot = unsafe {
            let (into, key, len) = (into.as_mut_ptr().cast(), key.as_ptr().cast(), key.len());
            (self.calls.volume_key_get)(self.handle.as_ptr(), ANY_SLOT, into, &raw mut size, key, len)
        };
        self.result(slot)?;
        if size != into.len() {
            return self.result(-libc::EINVAL).map(drop);
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: a handle that nobody uses any more.
        unsafe { (self.calls.free)(self.handle.as_ptr()) };
    }
}

/// Notes what the library says of an error.
unsafe extern "C" fn note(level: c_int, message: *const c_char, context: *mut c_void) {
    if level != LOG_ERROR || message.is_null() || context.is_null() {
        return;
    }
    // SAFETY: the library gives a text that ends with a zero, and the context that it was given with this function:
    // what belongs to a device, which waits in a call meanwhile.
    unsafe {
        let said = &mut (*context.cast::<Said>()).0;
        said.clear();
        said.push_str(CStr::from_ptr(message).to_string_lossy().trim());
    }
}
