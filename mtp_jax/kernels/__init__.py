"""Operations with several implementations: one folder per operation, one backend per file, one rule that selects.

`device.py` is the only place that asks what is compiled for.
"""

KERNEL = "kernel"  # checkpoint name of what a Pallas kernel keeps for its backward pass
