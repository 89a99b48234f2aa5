"""A lock on a file, held until its process ends, however that ends. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

log = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have none


class Lock:
    """An exclusive lock on the file ``path``, which is made for it and removed when it is released.

    The kernel releases it when the process ends. A file that a killed process has left is taken over.

    Attributes:
        path: the file.
        left_over: the file was there already, so its process ended before it could clear up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_over = False
        self._file: int | None = None

    def take(self) -> bool:
        """Whether this process has the lock now; False where another one has it.

        Raises:
            OSError: the file cannot be made.
        """
        while self._file is None:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                self.left_over = False
            except FileExistsError:
                file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                self.left_over = True
            except FileNotFoundError:
                if self.path.parent.is_dir():
                    continue  # whoever had it has removed it between the two
                raise
            if not self._locked(file):
                os.close(file)
                return False
            if self._is_current(file):
                self._file = file
                os.truncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            else:
                os.close(file)  # another process has removed it meanwhile: this is a lock on nothing
        return True

    def holder(self) -> str:
        """Who has it, for people; empty where that is not known."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")[:200]
        except OSError:
            return ""

    def release(self) -> None:
        """Remove the file and let others have it; nothing where it is not held."""
        file, self._file = self._file, None
        if file is not None:
            try:
                self.path.unlink(missing_ok=True)
            finally:
                os.close(file)

    def _locked(self, file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("The file system of %s has no locks: nothing keeps two runs apart there.", self.path)
        return True

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False
