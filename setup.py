"""Packages of the wheel: mtp_jax, and configs/ as mtp_jax/configs; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mtp_jax", "mtp_jax.*"]), "mtp_jax.configs"],
    package_dir={"mtp_jax.configs": "configs"},
    package_data={
        "mtp_jax": ["py.typed"],
        "mtp_jax.configs": ["tasks/**/*.yaml", "tasks/**/_*yaml", "tasks/**/*.py"],
    },
)
