"""Tests, laid out like mtp_jax/; reference/ holds the numpy oracles."""
