"""Notices of a run through Python's `logging`: logger "mtp_jax", with the process and the step in every record."""

import logging

import jax

LOGGER = logging.getLogger("mtp_jax")


def notice(message: str, step: int | None = None, level: int = logging.WARNING) -> None:
    """Logs one line; the record has the attributes `process_index` (int) and `step` (int, or None).

    Args:
      message: the line, without the step.
      step: the step that it is about, which the line begins with; None: not about a step.
      level: a level of `logging`.
    """
    at = "" if step is None else f"step {step}: "
    LOGGER.log(level, "%s%s", at, message, extra={"process_index": jax.process_index(), "step": step})
