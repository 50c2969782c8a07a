"""Operations with several backends: one folder per operation, one file per backend, one selection rule.

`device.py` is the only module that reads the platform.
"""

KERNEL = "kernel"  # checkpoint name of the residuals of Pallas kernels
