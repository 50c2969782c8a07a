"""Goodput: the share of a run's time in training steps, and the causes of the rest."""

import json

from mtp_jax.errors import first_line
from mtp_jax.storage import write_text
from mtp_jax.training.clock import CAUSES, Clock
from mtp_jax.training.metrics import clock as shown_time
from mtp_jax.training.notices import notice
from mtp_jax.training.stages.stage import Session, Stage

FILE = "goodput.json"


class ReportGoodput(Stage):
    """Ends the startup after the first step; at the end prints the division of the time and writes goodput.json.

    goodput.json has the last attempt of a run: first_step, last_step, goodput (seconds of steps over all seconds) and
    seconds by cause (`clock.CAUSES`).
    """

    def after_step(self, session: Session) -> None:
        if session.step == session.first_step + 1:
            session.fetch()  # waits for the first step
            seconds = session.clock.started()
            if session.is_main:
                print(f"first step done {seconds:.1f} s after the start, compilation included", flush=True)

    def finish(self, session: Session) -> None:
        if session.is_main and session.step > session.first_step:
            session.clock.training_seconds()  # brings the seconds up to date
            print(summary(session.clock), flush=True)
            try:
                write_text(session.workdir / FILE, json.dumps(as_json(session), indent=2) + "\n")
            except OSError as error:  # of a run that is done
                notice(f"{FILE} cannot be written ({first_line(error)})")


def as_json(session: Session) -> dict[str, object]:
    """Returns the contents of goodput.json."""
    seconds, total = session.clock.seconds, session.clock.total()
    return {
        "first_step": session.first_step,
        "last_step": session.step,
        "goodput": seconds["step"] / total,
        "seconds": {cause: round(seconds[cause], 3) for cause in CAUSES},
    }


def summary(clock: Clock) -> str:
    """Returns `goodput  83.1% of 12:31 in steps; startup 9.1%, data 0.2%, ...` without causes of less than 0.1 %."""
    total = clock.total()
    shares = {cause: seconds / total for cause, seconds in clock.seconds.items()}
    others = ", ".join(f"{c} {s:.1%}" for c, s in shares.items() if c != "step" and s >= 0.001)
    return f"goodput  {shares['step']:.1%} of {shown_time(total)} in steps; {others}"
