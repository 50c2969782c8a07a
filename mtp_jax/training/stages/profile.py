"""A profile of some steps (`training.profile`), written by xprof's profiler under WORKDIR/profile."""

import jax

from mtp_jax.config import profiled_steps
from mtp_jax.training.notices import notice
from mtp_jax.training.stages.stage import Session, Stage


class Profile(Stage):
    """Traces the steps of training.profile on every process. A profiler that fails is reported and ends nothing."""

    def __init__(self) -> None:
        self._is_tracing = False

    def before_step(self, session: Session) -> None:
        steps = profiled_steps(session.config.training)
        if session.step + 1 not in steps or self._is_tracing:
            return
        session.fetch()  # the trace begins with the first of the steps
        with session.paused("profile"):
            try:
                jax.profiler.start_trace(str(session.workdir / "profile"))
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
            except Exception as error:
                notice(f"training.profile: the trace cannot be written ({error})")
