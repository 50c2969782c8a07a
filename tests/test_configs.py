"""Every config in configs/ at full size, through eval_shape: it validates, and its model has the published weights."""

import pathlib
from dataclasses import replace

import pytest

from mtp_jax.config import load_config, validate
from mtp_jax.model import count_parameters
from mtp_jax.training.flops import parameter_counts
from mtp_jax.training.loop import with_vocabulary

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
BYTE_VOCABULARY = 261
DEVICES = {"deepseek_v3_671b": 256, "deepseek_v2_lite_16b": 16}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_config_is_documented_and_valid(path):
    docstring = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in docstring and "Hardware:" in docstring and "xpected" in docstring + "Expected"
    config = load_config(str(path))
    validate(config, DEVICES.get(path.stem, 1))
    config = with_vocabulary(config, BYTE_VOCABULARY)
    counted = parameter_counts(config)
    assert count_parameters(config) == (counted.total + counted.mtp_total, counted.active + counted.mtp_active)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek_v3_671b", 671e9, 37e9),
        ("deepseek_v2_lite_16b", 15.7e9, 2.4e9),
        ("moe_4b", 4.6e9, None),
        ("dense_1b", 1.19e9, None),
    ],
)
def test_published_parameter_counts(name, total, active):
    config = load_config(str(CONFIGS / f"{name}.py"), ["--config.mtp.kind=none"])
    counted, counted_active = count_parameters(replace(config))
    assert counted == pytest.approx(total, rel=0.01)
    if active:
        assert counted_active == pytest.approx(active, rel=0.02)
