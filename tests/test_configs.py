"""Every config in configs/ at full size, through eval_shape: it validates, and its model has the published weights."""

import pathlib

import pytest

from mtp_jax.config import load_config, validate
from mtp_jax.model import count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.training.run import with_vocabulary

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
BYTE_VOCABULARY = 261
DEVICES = {"deepseek_v3_671b": 256, "deepseek_v2_lite_16b": 16}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_config_is_documented_and_valid(path):
    docstring = path.read_text().split('"""')[1]
    for part in (f"--config=configs/{path.name}", "Hardware:", "Expected:"):
        assert part in docstring
    config = load_config(str(path))
    validate(config, DEVICES.get(path.stem, 1))
    counted = count_parameters(with_vocabulary(config, BYTE_VOCABULARY).architecture)
    assert (counted.mtp_total > 0) == (kind_of(config).depth > 0) and counted.active <= counted.total


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp_total"),
    [
        ("deepseek_v3_671b", 671e9, 37e9, 11.6e9),
        ("deepseek_v2_lite_16b", 15.7e9, 2.4e9, 0.593e9),
        ("moe_4b", 4.6e9, 0.872e9, 0),
        ("dense_1b", 1.19e9, 0.984e9, 0),
    ],
)
def test_published_parameter_counts(name, total, active, mtp_total):
    counted = count_parameters(load_config(str(CONFIGS / f"{name}.py")).architecture)
    assert counted.total == pytest.approx(total, rel=0.005)
    assert counted.active == pytest.approx(active, rel=0.025)
    assert counted.mtp_total == pytest.approx(mtp_total, rel=0.005)
