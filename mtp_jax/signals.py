"""Signals that end a command: at once while there is nothing to save, after the current step in a training loop.

Only the standard library, so that `install` can run before anything else is imported. Python runs the handlers of
signals between two bytecodes of the main thread, which a compilation in C++ delays by minutes, and an exception raised
there may be lost (inside a callback of the garbage collector, it is printed and ignored). Here a thread learns of a
signal through the wakeup file descriptor and ends the process itself.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130  # EX_TEMPFAIL of sysexits.h; 128 + SIGINT

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # each ends a process that has no handler for it
# A signal to a process group and the same one passed on by a launcher are one request.
REPEAT_SECONDS = 2.0
GRACE_SECONDS = 10.0  # between two notices of what a requested stop is waiting for


class _Stop:
    """The requested end of this process, and what has to be saved before it.

    Attributes:
      number: the first signal received since the last reset, or None.
      waiting_for: a noun phrase for notices, such as "step 12".
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.waiting_for = ""
        self.is_installed = False
        self._defers = False  # state would be lost: the loop ends by itself
        self._forward: Callable[[], None] | None = None  # the handler that agrees on a step with other processes
        self._previous: dict[int, signal.Handlers | Callable | int | None] = {}
        self._lock = threading.Lock()
        self._num_from_fd = self._num_from_handler = self._num_handled = 0
        self._first_time = 0.0

    def install(self) -> None:
        """Installs the handlers and the thread, for the rest of the process."""
        if self.is_installed or threading.current_thread() is not threading.main_thread():
            return
        self.is_installed = True
        self._set_handlers(self._handler)
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _set_handlers(self, handler: Callable) -> None:
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # ignored under nohup, or in the background of a shell
                self._previous[number] = before
                signal.signal(number, handler)

    def _forget(self) -> None:
        """Gives a forked child the default handlers: it shares the pipe of this process."""
        with contextlib.suppress(ValueError):  # forked from another thread
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)

    def _handler(self, number: int, frame: FrameType | None) -> None:
        """Tells the thread a second time: an event loop such as uvloop's takes the wakeup file descriptor."""
        del frame
        if self.number is None:
            self.number = number
        self._num_from_handler += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"\0")

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], None if self.number is None else GRACE_SECONDS)
            if not ready:
                self._say(f"note: {self._name()} received; waiting for {self.waiting_for or 'the end of the step'}")
                continue
            for number in os.read(self._reader, 64):
                if number in self._previous:
                    self._num_from_fd += 1
                    self.number = self.number or number
            # Python's handler sees each signal that the descriptor reports, later; or only one of the two sees it.
            count = max(self._num_from_fd, self._num_from_handler)
            for _ in range(count - self._num_handled):
                self._handle()
            self._num_handled = count

    def _handle(self) -> None:
        with self._lock:
            if not self._defers:
                self._end("; there is nothing to save; run the same command to go on")
            if self._first_time and time.monotonic() - self._first_time > REPEAT_SECONDS:
                self._end(" twice: ended at once; run the same command to go on from the newest checkpoint")
            if not self._first_time:
                self._first_time = time.monotonic()
                if self._forward:
                    self._forward()

    def _end(self, text: str) -> None:
        self._say(f"error: stopped by {self._name()}{text}")
        end_process(self.exit_code)

    def _name(self) -> str:
        return signal.Signals(self.number or signal.SIGTERM).name

    @staticmethod
    def _say(line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())

    @property
    def exit_code(self) -> int:
        """Exit code of a run that a signal has ended."""
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_PREEMPTED

    @contextlib.contextmanager
    def deferred(self, alone: bool = True) -> Iterator["_Stop"]:
        """A region with unsaved state: a signal sets `number`, and the body ends by itself; a second one ends it at
        once. At the end of the region without an exception, a process that is alone and received a signal ends.

        Where `install` was not called, only a first signal is handled, and several processes or a thread other than the
        main one keep their handlers.

        Args:
          alone: whether no other process takes part in the run.
        """
        if not self.is_installed:
            with self._first_signal_only() if alone else contextlib.nullcontext():
                yield self
            return
        with self._lock:
            self._defers = True
        try:
            yield self
        finally:
            failed = sys.exc_info()[0] is not None
            with self._lock:
                self._defers = False
                if self.number is not None and alone and not failed:
                    self._end("; the state of the last step is saved; run the same command to go on")

    @contextlib.contextmanager
    def _first_signal_only(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def give_back(*_: object) -> None:
            for number, before in self._previous.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
            self._previous.clear()

        def received(number: int, frame: FrameType | None) -> None:
            del frame
            self.number = number
            give_back()

        self.number = None
        self._set_handlers(received)
        try:
            yield
        finally:
            give_back()
            self.number = None

    def forward_to(self, number: signal.Signals, native: "NativeHandler") -> None:
        """Puts the handler back over `native`, which a C++ library has installed, and calls that one for a first signal
        of any kind inside `deferred`."""
        self._forward = lambda: native(number)
        signal.signal(number, self._handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """A region whose new threads and processes never receive the signals of NAMES.

    Ctrl-C and some launchers signal the whole process group: a data worker that ended by itself would fail the step
    that is to be saved.
    """
    numbers = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


STOP = _Stop()
install = STOP.install
NativeHandler = Callable[[int], None]


def native_handler(number: signal.Signals) -> NativeHandler | None:
    """Returns the handler of a signal that was installed in C, as a function; None where there is none.

    Resets the signal to its default. (Python's signal module only reports that such a handler exists.)
    """
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    address = library.signal(number, None)  # SIG_DFL is a null pointer
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address and address != 1 else None  # SIG_IGN is 1


def end_process(code: int) -> None:
    """Ends this process and the processes it has started through multiprocessing; finalizers do not run.

    Flushes stdout, for a second at most: the main thread may be waiting for the reader of a pipe.
    """
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(1.0)
    if multiprocessing := sys.modules.get("multiprocessing"):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
