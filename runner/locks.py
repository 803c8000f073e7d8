"""Locks between processes: for an open file, and for the life of a process."""

import errno
import os
import platform
import re
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer


def try_lock(file, wait, shared=False):
    """Take a lock on an open file, exclusive or `shared`, which ends with the process, however that ends.

    Returns whether the file system knows locks. Raises BlockingIOError where another process has it and not `wait`.
    """
    if shared and not fcntl:  # Windows removes no file that is open, which is all that readers ask for
        return False
    try:
        if fcntl:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except PermissionError as error:  # Windows' word for a lock that another process has
        raise BlockingIOError(*error.args) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def unlock(file):
    """Release what `try_lock` took."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_UN)
    else:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


@contextmanager
def locked(file):
    """Hold an exclusive lock on an open file; yields whether there is one: some network file systems have none."""
    is_locked = try_lock(file, wait=True)
    try:
        yield is_locked
    finally:
        if is_locked:
            unlock(file)


def lock_path(path):
    """The lock of whoever writes `path`, whatever links lead to it: `.NAME.lock` next to it."""
    path = Path(path).resolve()
    return path.with_name(f".{path.name}.lock")


class LockFile:
    """A lock for the life of a process: a file that says who holds it, and that is gone when nobody does."""

    def __init__(self, path):
        self.path, self.file, self.is_effective = Path(path), None, False

    def acquire(self):
        """Returns None, or who holds it; `is_effective` then says whether the file system has locks.

        Raises OSError where the file cannot be written, or is no lock: it would be emptied and removed.
        """
        while True:
            file = open(self.path, "a+", encoding="utf-8")
            try:
                self.is_effective = try_lock(file, wait=False)
            except BlockingIOError:
                with file, suppress(OSError):  # Windows: what is locked cannot be read
                    file.seek(0)
                    return file.read().strip() or "another process"
                return "another process"
            with suppress(OSError):  # its last holder may have removed it after it was opened here
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            file.close()
        self.file = file
        file.seek(0)
        if not re.fullmatch(r"(process \d+ on .*\n)?", file.read()):
            file.close()
            self.file = None
            raise FileExistsError(errno.EEXIST, "a file of this name exists and is not a lock", str(self.path))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()

    def release(self):
        """Remove the file and end the lock, if it is held."""
        if self.file is not None:
            if not fcntl:  # Windows removes nothing that is open
                self.file.close()
            with suppress(OSError):
                self.path.unlink()
            self.file.close()
            self.file = None
