"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.section.key=VALUE ...]

The command of mtp_jax/tools/train.py, for a clone that is not installed; installed, it is mtp-train.
"""

from mtp_jax.tools.train import command, main

__all__ = ["command", "main"]

if __name__ == "__main__":
    command()
