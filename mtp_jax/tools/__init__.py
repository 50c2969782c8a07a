"""Command lines: the console scripts mtp-train, mtp-eval and so on, or python -m mtp_jax.tools.NAME."""
