"""A profile of some steps (`training.profile`), written by xprof's profiler under WORKDIR/profile."""

import pathlib
import tempfile

import jax
from etils import epath

from mtp_jax import storage
from mtp_jax.config import profiled_steps
from mtp_jax.training.notices import notice
from mtp_jax.training.stages.stage import Session, Stage


class Profile(Stage):
    """Traces the steps of training.profile on every process. A profiler that fails is reported and ends nothing.

    The profiler writes local files; for a workdir in an object store they are put there at the end of the trace.
    """

    def __init__(self) -> None:
        self._is_tracing = False
        self._target: epath.Path | None = None  # in an object store
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def before_step(self, session: Session) -> None:
        steps = profiled_steps(session.config.training)
        if session.step + 1 not in steps or self._is_tracing:
            return
        session.fetch()  # the trace begins with the first of the steps
        with session.paused("profile"):
            try:
                jax.profiler.start_trace(self._folder(session.workdir / "profile"))
                self._is_tracing = True
            except Exception as error:  # whatever a profiler of some platform raises
                notice(f"training.profile: the profiler does not start ({error})", session.step)

    def after_step(self, session: Session) -> None:
        steps = profiled_steps(session.config.training)
        if self._is_tracing and (session.step + 1 not in steps or session.is_last or session.is_stopped):
            session.fetch()
            with session.paused("profile"):
                self.close()
            if session.is_main:
                print(f"profile  steps up to {session.step} in {session.workdir / 'profile'}", flush=True)

    def close(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            try:
                jax.profiler.stop_trace()
                self._put()
            except Exception as error:
                notice(f"training.profile: the trace cannot be written ({error})")

    def _folder(self, target: epath.Path) -> str:
        """Returns the local folder to write to."""
        if storage.is_local(target):
            return str(target)
        self._target, self._temporary = target, tempfile.TemporaryDirectory(prefix="mtp_jax_profile_")
        return self._temporary.name

    def _put(self) -> None:
        """Copies the files of a trace to the object store."""
        if self._target is None or self._temporary is None:
            return
        with self._temporary as folder:
            for path in pathlib.Path(folder).rglob("*"):
                if path.is_file():
                    storage.write_bytes(self._target / path.relative_to(folder).as_posix(), path.read_bytes())
