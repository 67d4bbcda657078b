//! What is used of librados and librbd (rados/librados.h, rbd/librbd.h), and what keeps it safe to use. No crate is kept up
//! that has both, and it is some thirty functions.
#![allow(unsafe_code)] // a library in another language

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use crate::backend::formatted::errand::{Answer, Inbox};

type Rados = *mut c_void;
type IoCtx = *mut c_void;
type Handle = *mut c_void;
type Completion = *mut c_void;

/// `RBD_FEATURE_EXCLUSIVE_LOCK`.
const FEATURE_EXCLUSIVE_LOCK: u64 = 1 << 2;
/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`.
const THICK: c_int = 1;

#[link(name = "rados")]
unsafe extern "C" {
    fn rados_create(cluster: *mut Rados, id: *const c_char) -> c_int;
    fn rados_conf_read_file(cluster: Rados, path: *const c_char) -> c_int;
    fn rados_conf_set(cluster: Rados, option: *const c_char, value: *const c_char) -> c_int;
    fn rados_connect(cluster: Rados) -> c_int;
    fn rados_shutdown(cluster: Rados);
    fn rados_ioctx_create(cluster: Rados, pool: *const c_char, ioctx: *mut IoCtx) -> c_int;
    fn rados_ioctx_set_namespace(ioctx: IoCtx, namespace: *const c_char);
    fn rados_ioctx_destroy(ioctx: IoCtx);
}

#[link(name = "rbd")]
unsafe extern "C" {
    fn rbd_open(ioctx: IoCtx, name: *const c_char, image: *mut Handle, snapshot: *const c_char) -> c_int;
    fn rbd_open_read_only(
        ioctx: IoCtx,
        name: *const c_char,
        image: *mut Handle,
        snapshot: *const c_char,
    ) -> c_int;
    fn rbd_close(image: Handle) -> c_int;
    fn rbd_get_size(image: Handle, size: *mut u64) -> c_int;
    fn rbd_get_features(image: Handle, features: *mut u64) -> c_int;
    fn rbd_update_watch(
        image: Handle,
        watch: *mut u64,
        changed: extern "C" fn(*mut c_void),
        arg: *mut c_void,
    ) -> c_int;
    fn rbd_update_unwatch(image: Handle, watch: u64) -> c_int;
    fn rbd_aio_create_completion(
        arg: *mut c_void,
        done: extern "C" fn(Completion, *mut c_void),
        completion: *mut Completion,
    ) -> c_int;
    fn rbd_aio_get_return_value(completion: Completion) -> isize;
    fn rbd_aio_release(completion: Completion);
    fn rbd_aio_readv(
        image: Handle,
        iov: *const libc::iovec,
        count: c_int,
        offset: u64,
        completion: Completion,
    ) -> c_int;
    fn rbd_aio_writev(
        image: Handle,
        iov: *const libc::iovec,
        count: c_int,
        offset: u64,
        completion: Completion,
    ) -> c_int;
    fn rbd_aio_flush(image: Handle, completion: Completion) -> c_int;
    fn rbd_aio_discard(image: Handle, offset: u64, len: u64, completion: Completion) -> c_int;
    fn rbd_aio_write_zeroes(
        image: Handle,
        offset: u64,
        len: usize,
        completion: Completion,
        zero_flags: c_int,
        op_flags: c_int,
    ) -> c_int;
    fn rbd_flush(image: Handle) -> c_int;
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

fn text(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn or_null(text: Option<&CStr>) -> *const c_char {
    text.map_or(null(), CStr::as_ptr)
}

/// A client of a cluster.
#[derive(Debug)]
pub struct Cluster(Rados);

// SAFETY: librados says that a cluster's handle may be used by any thread.
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

impl Cluster {
    /// A client as `id`, that is not connected.
    pub fn new(id: Option<&str>) -> io::Result<Cluster> {
        let id = id.map(text).transpose()?;
        let mut cluster = null_mut();
        // SAFETY: it takes a string that ends with NUL, or none, and fills in the handle if it succeeds.
        check(unsafe { rados_create(&raw mut cluster, or_null(id.as_deref())) })?;
        Ok(Cluster(cluster))
    }

    /// Reads its configuration, from this file or from where it always is.
    pub fn read_conf(&self, path: Option<&str>) -> io::Result<()> {
        let path = path.map(text).transpose()?;
        // SAFETY: the handle is open until it is dropped; the string ends with NUL, or is none.
        check(unsafe { rados_conf_read_file(self.0, or_null(path.as_deref())) })
    }

    /// Sets an option.
    pub fn set(&self, option: &str, value: &str) -> io::Result<()> {
        let (option, value) = (text(option)?, text(value)?);
        // SAFETY: the handle is open until it is dropped; the strings end with NUL, and are copied.
        check(unsafe { rados_conf_set(self.0, option.as_ptr(), value.as_ptr()) })
    }

    /// Connects, which starts the library's threads.
    pub fn connect(&self) -> io::Result<()> {
        // SAFETY: the handle is open until it is dropped, and this is done once.
        check(unsafe { rados_connect(self.0) })
    }

    /// Opens a pool.
    pub fn pool(self, name: &str, namespace: &str) -> io::Result<Pool> {
        let (name, namespace) = (text(name)?, text(namespace)?);
        let mut ioctx = null_mut();
        // SAFETY: the handle is open and stays so, in the pool; the strings end with NUL, and are copied.
        check(unsafe { rados_ioctx_create(self.0, name.as_ptr(), &raw mut ioctx) })?;
        // SAFETY: as above.
        unsafe { rados_ioctx_set_namespace(ioctx, namespace.as_ptr()) };
        Ok(Pool { ioctx, _cluster: self })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: nothing of it is in use any more: what is, owns it.
        unsafe { rados_shutdown(self.0) };
    }
}

/// A pool.
#[derive(Debug)]
pub struct Pool {
    ioctx: IoCtx,
    _cluster: Cluster,
}

// SAFETY: librados says that a pool's handle may be used by any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// Opens an image, or a snapshot of it.
    pub fn image(self, name: &str, snapshot: Option<&str>, read_only: bool) -> io::Result<Image> {
        let (name, snapshot) = (text(name)?, snapshot.map(text).transpose()?);
        let open = if read_only { rbd_open_read_only } else { rbd_open };
        let mut handle = null_mut();
        // SAFETY: the pool is open and stays so, in the image; the strings end with NUL, or are none, and are copied.
        check(unsafe { open(self.ioctx, name.as_ptr(), &raw mut handle, or_null(snapshot.as_deref())) })?;
        Ok(Image { handle, _pool: self })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the image that owns it is closed.
        unsafe { rados_ioctx_destroy(self.ioctx) };
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    handle: Handle,
    _pool: Pool,
}

// SAFETY: librbd takes requests to one image from any thread; it has locks of its own.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

/// What a completion is for: one that stays where it is until the callback has run.
#[derive(Debug)]
pub struct Token {
    /// Where it is told.
    pub inbox: Arc<Inbox>,
    /// Of which request.
    pub tag: u32,
}

/// On a thread of librbd's.
extern "C" fn done(completion: Completion, arg: *mut c_void) {
    // SAFETY: the completion is over and ours, and not used after this.
    let result = unsafe { rbd_aio_get_return_value(completion) };
    // SAFETY: as above.
    unsafe { rbd_aio_release(completion) };
    // SAFETY: whoever asked has vouched that the token lives until this call.
    let token = unsafe { &*arg.cast::<Token>() };
    let result = i32::try_from(result).unwrap_or(if result < 0 { -libc::EIO } else { i32::MAX });
    // The token may go as soon as this is told; the inbox is held for as long as it is told.
    let inbox = Arc::clone(&token.inbox);
    inbox.put(Answer { tag: token.tag, result, buffer: None });
}

/// On a thread of librbd's: somebody has changed the image.
extern "C" fn changed(arg: *mut c_void) {
    // SAFETY: the function is one of ours that lives as long as the program, given to `watch`.
    let tell: fn() = unsafe { std::mem::transmute::<*mut c_void, fn()>(arg) };
    tell();
}

/// What is asked of an image.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    /// Read into these.
    Read(&'a [libc::iovec], u64),
    /// Write what is in these.
    Write(&'a [libc::iovec], u64),
    /// Make durable what was written.
    Flush,
    /// Give the space of a range up.
    Discard(u64, u64),
    /// Have a range read as zeros; its space may be given up.
    Zero(u64, u64, bool),
}

impl Image {
    /// Asks for something; the token's inbox is told what has become of it.
    ///
    /// # Safety
    /// The token, what it points to, and the memory that is named must stay valid and in place until that is told.
    pub unsafe fn ask(&self, ask: Ask<'_>, token: &Token) -> io::Result<()> {
        let mut completion = null_mut();
        let arg = std::ptr::from_ref(token).cast_mut().cast();
        // SAFETY: the callback takes the token, which our caller keeps until it has been called.
        check(unsafe { rbd_aio_create_completion(arg, done, &raw mut completion) })?;
        let image = self.handle;
        // SAFETY: the image is open, the completion new, and our caller keeps the memory until it is over.
        let asked = unsafe {
            match ask {
                Ask::Read(iov, at) => rbd_aio_readv(image, iov.as_ptr(), iov.len() as c_int, at, completion),
                Ask::Write(iov, at) => {
                    rbd_aio_writev(image, iov.as_ptr(), iov.len() as c_int, at, completion)
                }
                Ask::Flush => rbd_aio_flush(image, completion),
                Ask::Discard(at, len) => rbd_aio_discard(image, at, len, completion),
                Ask::Zero(at, len, unmap) => rbd_aio_write_zeroes(
                    image,
                    at,
                    len as usize,
                    completion,
                    if unmap { 0 } else { THICK },
                    0,
                ),
            }
        };
        check(asked).inspect_err(|_| {
            // SAFETY: librbd calls nobody back for what it has refused.
            unsafe { rbd_aio_release(completion) };
        })
    }

    /// Bytes, as the cluster has it now.
    pub fn size(&self) -> io::Result<u64> {
        let mut size = 0;
        // SAFETY: the image is open, and the number filled in if it succeeds.
        check(unsafe { rbd_get_size(self.handle, &raw mut size) })?;
        Ok(size)
    }

    /// Whether only one client at a time may write, which librbd sees to.
    pub fn has_exclusive_lock(&self) -> io::Result<bool> {
        let mut features = 0;
        // SAFETY: as for `size`.
        check(unsafe { rbd_get_features(self.handle, &raw mut features) })?;
        Ok(features & FEATURE_EXCLUSIVE_LOCK != 0)
    }

    /// Waits until all that was written is durable.
    pub fn flush(&self) -> io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { rbd_flush(self.handle) })
    }

    /// Has `tell` called, on a thread of librbd's, whenever the image has changed.
    pub fn watch(&self, tell: fn()) -> io::Result<u64> {
        let mut watch = 0;
        // SAFETY: the function lives as long as the program, and the number is filled in if it succeeds.
        check(unsafe { rbd_update_watch(self.handle, &raw mut watch, changed, tell as *mut c_void) })?;
        Ok(watch)
    }

    /// Ends a watch.
    pub fn unwatch(&self, watch: u64) {
        // SAFETY: the image is open. One that is no more is refused.
        let _ = unsafe { rbd_update_unwatch(self.handle, watch) };
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more, and nothing is under way: queues have drained before they let go of it.
        let _ = unsafe { rbd_close(self.handle) };
    }
}
