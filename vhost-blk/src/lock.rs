//! Keeping other writers away from an image, by the byte-range locks QEMU takes (its block/file-posix.c and
//! docs/system/images.rst): one byte for each permission in use, one for each that nobody else may have.
//!
//! QEMU sees ours and we see QEMU's, so neither can open for writing what the other has open.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use tracing::info;

/// `BLK_PERM_CONSISTENT_READ`, as a bit number.
const CONSISTENT_READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;
/// Byte of the first permission in use.
const IN_USE: i64 = 100;
/// Byte of the first permission not shared.
const NOT_SHARED: i64 = 200;

/// Why the image is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error(
        "another process has it open for writing; stop that process, use --read-only on both sides, or --incoming to \
         take over the guest that it serves"
    )]
    HeldByWriter,
    /// Somebody reads it who does not want it to change.
    #[error("another process reads it and does not allow writers; stop that process, or use --read-only")]
    HeldByReader,
    /// What had it is no process any more.
    #[error(
        "a process that is gone has given the kernel reads or writes of it that are not over after {0:?}; see what keeps \
         its storage from answering"
    )]
    HeldByTheDead(Duration),
    /// Another opening of it has not gone away.
    #[error("another process still has it open")]
    HeldBySomebody,
    /// The file system has no such locks.
    #[error("cannot lock: {0}")]
    Io(#[from] io::Error),
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn hold(file: &File, byte: i64) -> Result<(), LockError> {
    // Shared locks: that a byte is locked at all is the message.
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_RDLCK, byte))).map_err(io::Error::from)?;
    Ok(())
}

fn is_held(file: &File, byte: i64) -> Result<bool, LockError> {
    let mut probe = flock(libc::F_WRLCK, byte);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut probe)).map_err(io::Error::from)?;
    Ok(i32::from(probe.l_type) != libc::F_UNLCK)
}

/// How long a holder may take to let go. What a killed process had given to io_uring keeps its file open for a moment after
/// the process is gone, and a restart must not fail for that. Had the file been registered with the ring, it would stay
/// open until the kernel has taken the ring down: io_uring/io_uring.c, `io_ring_exit_work`, looks every HZ / 20 whether
/// something was left, and needs two such looks for a ring with deferred task work. A request's own reference, taken when
/// it is submitted and dropped when it has ended, keeps the promise below just as well.
///
/// More than that rests on it: what a killed process had given to io_uring goes on without it, and a write that reached
/// the image late could undo what the next process has written since, as a late read could overwrite guest memory that
/// the guest has put to other use. The locks belong to the open file, and each operation on it holds a reference to it
/// until it has ended, whether it is with the device, in a worker or still queued (fs/file_table.c: `__fput` drops the
/// locks, after the last reference). So who gets the lock comes after all of them, and nobody serves an image before.
const PATIENCE: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(3) };
/// The same where no process has the file open any more: nothing is left but operations, which end when the storage has
/// answered, and a disk that is busy with others may take its time.
const PATIENCE_WITH_STORAGE: Duration = Duration::from_secs(60);
/// How often to look meanwhile: a guest waits for its disk.
const LOOK: Duration = Duration::from_micros(500);

/// Locks `file` for reading, or for writing too; other writers are shut out either way. The locks last as long as the
/// open file.
pub fn lock(file: &File, writable: bool) -> Result<(), LockError> {
    let begun = Instant::now();
    let mut is_of_the_dead = false;
    loop {
        let error = match try_lock(file, writable) {
            Err(error @ (LockError::HeldByWriter | LockError::HeldByReader)) => error,
            outcome => return outcome,
        };
        // Let go meanwhile: of two that wait for each other, neither would get it.
        release(file)?;
        let waited = begun.elapsed();
        if waited > PATIENCE_WITH_STORAGE {
            return Err(LockError::HeldByTheDead(PATIENCE_WITH_STORAGE));
        }
        if waited > PATIENCE && !is_of_the_dead {
            is_of_the_dead = !is_open_elsewhere(file)?;
            if !is_of_the_dead {
                return Err(error);
            }
            info!("waiting for what a process that is gone has still to read and write");
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a process has the file open other than as `file`, or may have: one that we may not look into.
fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let ours = identity(file.metadata()?);
    let mut openings = 0;
    // Who may not look cannot tell: a thread that is confined, or one without /proc.
    let Ok(processes) = fs::read_dir("/proc") else { return Ok(true) };
    for process in processes.flatten() {
        if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        match fs::read_dir(process.path().join("fd")) {
            Ok(fds) => {
                let same = |fd: &fs::DirEntry| fs::metadata(fd.path()).is_ok_and(|m| identity(m) == ours);
                openings += fds.flatten().filter(same).count();
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
            // It has ended meanwhile.
            Err(_) => {}
        }
    }
    Ok(openings > 1)
}

/// Locks `file` beside another opening of it that holds the same locks and keeps everybody else away: the process that we
/// take over from. They last when that one is closed.
pub fn lock_beside(file: &File, writable: bool) -> Result<(), LockError> {
    take_all(file, writable)
}

/// Waits until nobody else holds locks of `file`: the process that had them beside us is dead, and loses them after the
/// last of its operations.
pub fn outlast(file: &File) -> Result<(), LockError> {
    let begun = Instant::now();
    while is_held(file, IN_USE + CONSISTENT_READ)? {
        if begun.elapsed() > PATIENCE {
            return Err(LockError::HeldBySomebody);
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Lets go of all that [`lock`] has taken.
pub fn release(file: &File) -> Result<(), LockError> {
    let mut all = flock(libc::F_UNLCK, IN_USE);
    all.l_len = NOT_SHARED + 64 - IN_USE;
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&all)).map_err(io::Error::from)?;
    Ok(())
}

fn take_all(file: &File, writable: bool) -> Result<(), LockError> {
    hold(file, IN_USE + CONSISTENT_READ)?;
    hold(file, NOT_SHARED + WRITE)?;
    if writable {
        hold(file, IN_USE + WRITE)?;
    }
    Ok(())
}

fn try_lock(file: &File, writable: bool) -> Result<(), LockError> {
    take_all(file, writable)?;
    // Taken first and looked at second: of two that come at once, both may lose, never both win.
    if is_held(file, IN_USE + WRITE)? || is_held(file, NOT_SHARED + CONSISTENT_READ)? {
        return Err(LockError::HeldByWriter);
    }
    if writable && is_held(file, NOT_SHARED + WRITE)? {
        return Err(LockError::HeldByReader);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let reader = open(image.path());
        lock(&reader, false).unwrap();
        let second = open(image.path());
        lock(&second, false).unwrap();
        assert!(matches!(lock(&open(image.path()), true), Err(LockError::HeldByReader)));
        drop((reader, second));
        let writer = open(image.path());
        lock(&writer, true).unwrap();
        assert!(matches!(lock(&open(image.path()), true), Err(LockError::HeldByWriter)));
        assert!(matches!(lock(&open(image.path()), false), Err(LockError::HeldByWriter)));
        // Its successor holds the same, with and after it.
        let successor = open(image.path());
        lock_beside(&successor, true).unwrap();
        assert!(matches!(lock(&open(image.path()), false), Err(LockError::HeldByWriter)));
        drop(writer);
        assert!(matches!(lock(&open(image.path()), true), Err(LockError::HeldByWriter)));
        assert!(matches!(outlast(&open(image.path())), Err(LockError::HeldBySomebody)));
        outlast(&successor).unwrap();
        drop(successor);
        lock(&open(image.path()), true).unwrap();
    }

    #[test]
    fn operations_of_the_dead_are_waited_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        // In nobody's table of descriptors, and open all the same: on its way through a socket.
        let (near, far) = UnixStream::pair().unwrap();
        {
            let writer = open(image.path());
            lock(&writer, true).unwrap();
            let fds = [writer.as_raw_fd()];
            let message = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(near.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None)
                .unwrap();
        }
        let path = image.into_temp_path();
        let begun = Instant::now();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(3 * PATIENCE);
            drop((near, far));
        });
        lock(&open(&path), true).unwrap();
        assert!(begun.elapsed() >= 3 * PATIENCE, "locked beside them");
        ends.join().unwrap();
    }
}
