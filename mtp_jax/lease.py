"""Lease of a folder: at most one process writes to it.

On a local disk it is a lock on a file in the folder, which the kernel releases when the process ends, however it ends.
In an object store it is an object that is created only if there is none, and that its holder replaces every few
seconds. Each replacement names the generation of the object that it replaces, so that of two processes one is refused.
A holder that has not renewed the object for as long as the lease lasts is taken to have ended.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager
from typing import Any

from mtp_jax import storage
from mtp_jax.errors import UserError, first_line, warn_once

LEASE_FILE = "lease.json"
SECONDS = 60.0  # after its last renewal a lease in an object store lasts this long
_MOST_SKEW = 600.0  # seconds by which the clocks of two hosts may differ
_TIMEOUT = 20.0  # seconds for a request, with the client's own retries


class InUse(UserError):
    """Another process holds the folder. One line. Exit code 2."""


class LeaseLost(RuntimeError):
    """Another process has taken over the folder. One line. Exit code 1."""


class Lease(AbstractContextManager["Lease"]):
    """Holds a folder from `with` to its end.

    Attributes:
      folder: the folder, as an epath.Path.
    """

    def __init__(
        self, folder: storage.AnyPath, name: str = "--workdir", seconds: float = SECONDS, file: str = LEASE_FILE
    ):
        """Prepares a lease; takes nothing yet.

        Args:
          folder: a local path or a URL.
          name: the flag with this value, for error messages.
          seconds: duration of a lease in an object store. It is renewed four times in this time.
          file: name of the file in the folder. Leases of different files do not exclude each other.
        """
        self.folder = storage.path(folder, name)
        self._shown = f"{name}={folder}"
        self._holder: _File | _Object = (
            _File(self.folder, self._shown, file)
            if storage.is_local(self.folder)
            else _Object(self.folder, self._shown, file, seconds)
        )

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the folder.

        A process of this host that has ended is replaced at once. One of another host is observed for up to `seconds`,
        until it renews its lease or the lease expires.

        Raises:
          InUse: another process holds it; the message has its host, process id and start.
          UserError: the folder is a file or cannot be written.
          StorageError: the object store fails, or the disk is full.
        """
        self._holder.acquire()

    def release(self) -> None:
        """Gives the folder back, if it was taken."""
        self._holder.release()

    @property
    def descriptor(self) -> int:
        """The open file that holds a local folder; a child that inherits it holds the folder too, until it ends."""
        assert isinstance(self._holder, _File) and self._holder.descriptor is not None, "a local folder, and held"
        return self._holder.descriptor

    def check(self) -> bool:
        """Returns whether the folder is known to be held; renews a lease that has expired.

        False: the lease has expired and the object store cannot be reached. Nothing should be written then.

        Raises:
          LeaseLost: another process has taken it.
        """
        return self._holder.check()


class _File:
    """A lock on a local file."""

    def __init__(self, folder: Any, shown: str, file: str):
        self._folder, self._shown = folder, shown
        self._path = os.fspath(folder / file)
        self.descriptor: int | None = None
        self._is_new = False  # the folder was made here

    def acquire(self) -> None:
        if os.path.exists(self._folder) and not os.path.isdir(self._folder):
            raise UserError(f"{self._shown}: is a file; give a folder")
        if os.path.islink(self._folder) and not os.path.exists(self._folder):
            raise UserError(
                f"{self._shown}: is a link to {os.readlink(self._folder)}, which leads nowhere; remove the link"
            )
        self._is_new = not os.path.isdir(self._folder)
        try:
            storage.make_folder(self._folder)
            self.descriptor = self._locked()
        except OSError as error:
            raise cannot_write(self._shown, error) from error
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(self.descriptor, 0)
            os.write(self.descriptor, json.dumps(_owner()).encode())

    def _locked(self) -> int:
        """Returns a descriptor of the file at the path, locked."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            except BlockingIOError:
                owner = _parsed(os.pread(descriptor, 2**16, 0))
                os.close(descriptor)
                raise _in_use(self._shown, owner) from None
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                warn_once(f"{self._shown}: its file system has no locks; start no second run in this folder")
                return descriptor
            os.close(descriptor)  # of a file that its holder has just removed

    def check(self) -> bool:
        return True

    def release(self) -> None:
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # before the lock is released: a later holder's file stays
                if self._is_new:
                    os.rmdir(self._folder)  # fails unless nothing was written, as where a run was refused
            os.close(self.descriptor)
            self.descriptor = None


class _Object:
    """An object that is renewed by a thread."""

    def __init__(self, folder: Any, shown: str, file: str, seconds: float):
        self._shown, self._seconds = shown, seconds
        self._file, self._url = file, os.fspath(folder / file)
        self._owner = _owner()
        self._lock = threading.Lock()  # one request at a time
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)
        self._generation = b""  # of the object that this process has written last
        self._renewed = -float("inf")  # time of the request that wrote it, of _now()
        self._lost: str | None = None

    def acquire(self) -> None:
        with storage.errors(self._url):
            self._take()
        self._thread.start()

    def _take(self) -> None:
        """Creates the lease, or replaces that of a process that has ended; observes one that may not have."""
        content, seen = self._read()
        first, started, is_reported = seen, _now(), False
        while True:
            owner = _parsed(content)
            if owner.get("id") == self._owner["id"]:  # written by a request whose answer was lost
                self._generation, self._renewed = seen, started
                return
            if content is not None and (seen != first or _is_alive(owner)):
                raise _in_use(self._shown, owner)
            seconds = owner.get("seconds")
            patience = float(seconds) if isinstance(seconds, int | float) else self._seconds
            age = time.time() - owner["renewed"] if isinstance(owner.get("renewed"), int | float) else 0.0
            if content is None or _has_ended(owner) or age > patience + _MOST_SKEW or _now() - started > patience:
                if self._write(seen):
                    return
            elif not is_reported:
                is_reported = True
                print(
                    f"waiting  up to {patience:.0f} s for {_described(owner)}: its lease of {self._shown} is not "
                    "released and may be that of a process that was killed",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(1.0, patience / 20))
            content, seen = self._read()

    def check(self) -> bool:
        if self._lost is None and self._is_expired():
            self._try_to_renew()
        if self._lost is not None:
            raise LeaseLost(self._lost)
        return not self._is_expired()

    def _is_expired(self) -> bool:
        return _now() - self._renewed > self._seconds

    def release(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5.0)
        if self._lost is None and self._generation and self._lock.acquire(timeout=5.0):
            # Only the object that this process wrote is removed; otherwise it expires
            with contextlib.suppress(Exception):
                self._store().write(self._file, None, if_equal=self._generation).result(timeout=5.0)

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(self._seconds / 4) and self._lost is None:
            self._try_to_renew()
        if self._lost is not None:
            print(f"error: {self._lost}", file=sys.stderr, flush=True)

    def _try_to_renew(self) -> None:
        try:
            self._renew()
        except Exception as error:  # of the client; the next attempt may succeed
            warn_once(f"{self._shown}: its lease cannot be renewed ({first_line(error)}); trying again")

    def _renew(self) -> None:
        """Writes the lease again; sets `_lost` if another process has written it. Raises on a failing store."""
        with self._lock:
            if self._lost is not None or self._write(self._generation):
                return
            content, generation = self._read()
            owner = _parsed(content)
            if owner.get("id") == self._owner["id"]:
                self._generation = generation
                self._write(generation)
            elif content is not None or not self._write(generation):  # None: removed by hand
                self._lost = f"{self._shown}: has been taken over by {_described(owner)}; this run stops"

    def _write(self, generation: bytes) -> bool:
        """Writes the lease if the object is the one of that generation; returns whether it was."""
        started = _now()
        content = self._owner | {"renewed": time.time(), "seconds": self._seconds}
        write = self._store().write(self._file, json.dumps(content).encode(), if_equal=generation)
        written = write.result(timeout=min(_TIMEOUT, self._seconds)).generation
        if not written:
            return False
        self._generation, self._renewed = written, started
        return True

    def _read(self) -> tuple[bytes | None, bytes]:
        """Returns the content of the object, None if there is none, and its generation (that of a missing one too)."""
        found = self._store().read(self._file).result(timeout=min(_TIMEOUT, self._seconds))
        return (bytes(found.value) if found.state == "value" else None), found.stamp.generation

    def _store(self) -> Any:
        import tensorstore  # has conditional writes for every object store

        if not hasattr(self, "_opened"):
            self._opened = tensorstore.KvStore.open(self._url.removesuffix(self._file)).result()
        return self._opened


def cannot_write(shown: str, error: OSError) -> UserError | storage.StorageError:
    """Returns the error for a folder that cannot be written: StorageError if the disk is full, else UserError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return storage.StorageError(
            error.errno, f"{shown}: cannot be written ({storage.reason(error)}); free some space, then run it again"
        )
    return UserError(f"{shown}: cannot be written ({storage.reason(error)}); use another folder")


def _owner() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": since,
        "processes": _process_space(),
        "started": _start_of(os.getpid()),
    }


def _parsed(content: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(content or b"{}")
        if isinstance(values, dict):
            return values
    return {}


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another run"
    return f"a run on host {owner.get('host')}, pid {owner['pid']}, since {owner.get('since')}"


def _in_use(shown: str, owner: dict[str, Any]) -> InUse:
    return InUse(f"{shown}: is in use by {_described(owner)}; wait for its end, or use another folder")


def _is_here(owner: dict[str, Any]) -> bool:
    """Returns whether a process has a number of this machine, so that it can be looked for."""
    space = _process_space()
    return bool(space) and owner.get("processes") == space and isinstance(owner.get("pid"), int)


def _is_alive(owner: dict[str, Any]) -> bool:
    return _is_here(owner) and _start_of(owner["pid"]) == owner.get("started")


def _has_ended(owner: dict[str, Any]) -> bool:
    return _is_here(owner) and not _is_alive(owner)


def _process_space() -> str:
    """Returns a name of the running kernel and its namespace of process ids; "" where there is no /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Returns the start of a process in clock ticks; "" if there is no such process or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _now() -> float:
    """Returns seconds of a clock that also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
