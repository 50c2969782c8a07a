"""Adding a kind of MTP: a subclass of `Kind`, and its name in `mtp.KINDS`.

This one has one parameter, and changes what the decoder reads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax import mtp
from mtp_jax.decoding.generator import Generator
from mtp_jax.layers.param import vector
from mtp_jax.model import abstract_model, init
from mtp_jax.mtp import DecoderInputs, Kind, kind_of
from mtp_jax.sharding import make_mesh
from mtp_jax.targets import one_document_rows
from mtp_jax.training.step import rows_of
from tests.mtp.kinds import batch_of, small, steps


class OddShift(nnx.Module):
    """A vector [D], 0 at the start."""

    def __init__(self, model, rngs):
        del rngs  # a random weight would take its key from here: layers/param.py, `matrix`
        self.shift = vector((model.embed_dim,), ("embed",), 0.0, model)


class Odd(Kind):
    """mtp.kind = odd: the next token alone, from embeddings that a learned vector is added to at odd positions."""

    name = "odd"

    def make_module(self, rngs):
        return OddShift(self.model, rngs)

    def decoder_inputs(self, module: OddShift, inputs: DecoderInputs) -> DecoderInputs:
        is_odd_BT1 = (inputs.positions_BT % 2 == 1)[..., None]
        return inputs._replace(h_BTD=inputs.h_BTD + is_odd_BT1 * module.shift[...].astype(inputs.h_BTD.dtype))

    def unstack(self, module: OddShift, ready):
        return ready(module)


@pytest.fixture
def registered(monkeypatch):
    """In `mtp.KINDS`, for one test; a kind of the package has its line there."""
    monkeypatch.setitem(mtp.KINDS, Odd.name, Odd)


def test_a_new_kind_trains_and_has_one_forward_pass(registered):
    config = small("--config.mtp.kind=odd")
    kind, batch = kind_of(config), batch_of(config)
    assert isinstance(kind, Odd) and (kind.depth, kind.lookahead) == (0, 0)
    metrics, state = steps(config, [batch, batch])  # the learning rate of the first step is 0
    assert np.isfinite([row["loss_main"] for row in metrics]).all() and "loss_mtp_1" not in metrics[0]
    assert np.abs(state["params"]["mtp"]["shift"]).min() > 0

    built, rows = abstract_model(config.architecture), rows_of(batch, kind)

    @jax.jit
    def run(params):
        model = built.merge(params, state["biases"])
        return model(rows).hidden, model.main(rows)

    hidden, main = run(state["params"])
    np.testing.assert_array_equal(hidden[0], main)
    state["params"]["mtp"]["shift"] = np.zeros_like(state["params"]["mtp"]["shift"])
    without, _ = run(state["params"])
    moved_BT, positions_BT = np.abs(hidden[0] - without[0]).max(2), batch["positions"][:, : hidden.shape[2]]
    counts_BT = np.asarray(rows.weight_KBT[0]) > 0
    assert moved_BT[(positions_BT == 0) & counts_BT].max() == 0  # a document's first token sees no odd one
    assert moved_BT[(positions_BT % 2 == 1) & counts_BT].min() > 0


def test_a_new_kind_decodes_as_it_was_trained(registered):
    config = small("--config.mtp.kind=odd")
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    params = jax.tree.map(lambda w: 5 * w, params)
    params["mtp"]["shift"] = jax.random.normal(jax.random.key(1), params["mtp"]["shift"].shape)
    decoder = Generator(config, params, biases, make_mesh(config.mesh, jax.devices()[:1]))
    text = [3, 1, 4]
    (written,) = decoder.generate([text], 8).tokens
    model = abstract_model(config.architecture).merge(params, biases)
    tokens = jnp.array([[*text, *written]])
    choices = (model.main(one_document_rows(tokens, 0)) @ model.head()).argmax(-1)
    np.testing.assert_array_equal(written, choices[0, len(text) - 1 : -1])
