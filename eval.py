"""Evaluate a trained model: python eval.py --workdir=DIR --tasks=loss,acceptance [--output=FILE.json] [--limit=N]

The command of mtp_jax/tools/eval.py, for a clone that is not installed; installed, it is mtp-eval.
"""

from mtp_jax.tools.eval import command, main

__all__ = ["command", "main"]

if __name__ == "__main__":
    command()
