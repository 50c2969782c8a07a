"""The program that makes the initial state: one for all seeds, compiled with few optimizations on CPUs."""

import jax
import numpy as np

from mtp_jax.config import load_config, with_values
from mtp_jax.model import init
from mtp_jax.sharding import make_mesh
from mtp_jax.training.step import init_options, make_trainer


def test_all_seeds_share_a_program_and_have_weights_of_their_own():
    config = with_values(load_config("configs/tiny.py"), {"model.vocab_size": 261, "mesh.data": 1})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    programs = []
    for seed in (0, 5):
        seeded = with_values(config, {"seed": seed})
        with jax.set_mesh(mesh):
            make = make_trainer(seeded, mesh).init
            programs.append(make.func.lower(*make.args).as_text())
            params = make()["params"]
        expected, _ = jax.jit(lambda seed=seed: init(config.architecture, seed))()
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert programs[0] == programs[1]


def test_cpus_compile_it_with_few_optimizations_unless_jax_makes_even_fewer():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    before = jax.config.read("jax_disable_most_optimizations")
    try:
        jax.config.update("jax_disable_most_optimizations", False)
        assert init_options(mesh) == {"xla_backend_optimization_level": 1}
        jax.config.update("jax_disable_most_optimizations", True)
        assert init_options(mesh) == {}
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
