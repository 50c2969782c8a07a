"""Gradient norms of parts of the model: they add up to the global norm, and name what is not finite."""

import jax
import numpy as np
import optax
import pytest

from mtp_jax.layers.param import ParamInfo
from mtp_jax.training import gradient_groups

LAYER, MATRIX = ParamInfo(("layers", None)), ParamInfo((None, None))
INFOS = {
    "trunk": {
        "embed": MATRIX,
        "blocks": {"a": LAYER, "b": ParamInfo(("layers", None, None))},
        "unembed": MATRIX,
        "final_norm": {"scale": ParamInfo((None,))},
    },
    "mtp": {"module": {"a": LAYER}, "shared": MATRIX},
}
SHAPES = {
    "trunk": {
        "embed": (5, 2),
        "blocks": {"a": (3, 2), "b": (3, 2, 2)},
        "unembed": (2, 5),
        "final_norm": {"scale": (2,)},
    },
    "mtp": {"module": {"a": (2, 4)}, "shared": (3, 3)},
}
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}


@pytest.fixture
def grads():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda shape: rng.standard_normal(shape, np.float32), SHAPES, **IS_SHAPE)


def groups():
    abstract = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, **IS_SHAPE)
    return gradient_groups.names(INFOS, abstract)


def shown(grads):
    return gradient_groups.not_finite(groups(), np.asarray(gradient_groups.norms(INFOS, grads)))


def test_the_norms_are_those_of_the_parts_and_of_the_whole(grads):
    found = dict(zip(groups(), np.asarray(gradient_groups.norms(INFOS, grads)), strict=True))
    assert set(found) == {
        *(("embedding", None), ("output head", None), ("final norm", None)),
        *(("decoder blocks", i) for i in range(3)),
        *(("MTP block", i) for i in range(2)),
    }
    blocks = grads["trunk"]["blocks"]
    for i in range(3):
        expected = np.sqrt((blocks["a"][i] ** 2).sum() + (blocks["b"][i] ** 2).sum())
        assert found["decoder blocks", i] == pytest.approx(expected, rel=1e-6)
    assert found["embedding", None] == pytest.approx(np.linalg.norm(grads["trunk"]["embed"]), rel=1e-6)
    assert gradient_groups.norm(INFOS, grads) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)


def test_parts_that_are_not_finite_are_named_by_layer(grads):
    assert shown(grads) == ""
    grads["trunk"]["blocks"]["b"][0, 1, 1] = np.inf
    grads["trunk"]["blocks"]["a"][1, 0] = np.nan
    grads["trunk"]["embed"][0, 0] = np.nan
    assert sorted(shown(grads).split(", ")) == ["decoder blocks[0..1]", "embedding"]
    grads["trunk"]["blocks"]["b"][2], grads["mtp"]["module"]["a"][1, 0] = np.nan, np.nan
    assert sorted(shown(grads).split(", ")) == ["MTP block[1]", "decoder blocks[0..2]", "embedding"]


def test_a_gap_between_layers_is_shown(grads):
    grads["trunk"]["blocks"]["a"][0, 0] = grads["trunk"]["blocks"]["a"][2, 0] = np.inf
    assert shown(grads) == "decoder blocks[0,2]"


def test_everything_is_named_as_everything(grads):
    assert shown(jax.tree.map(lambda g: g * np.nan, grads)) == "every part of the model"
