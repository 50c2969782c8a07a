"""A workdir belongs to one run: what may change when it continues, and what is refused in one clear line."""

import dataclasses
import json
import tarfile

import pytest

from mtp_jax.config import Config, DataConfig, MeshConfig, MTPConfig, TrainingConfig, UserError
from mtp_jax.config.aliases import old_names
from mtp_jax.training.workdir import changes, flat, open_workdir, read_config
from tests.golden_runs import CHECKPOINTS

CONFIG = Config(mtp=MTPConfig(kind="sequential", weight=0.3, weight_values=(0.1,), weight_boundaries=(10,)))


def _refused(workdir, config=CONFIG, **kwargs):
    with pytest.raises(UserError) as error:
        open_workdir(workdir, config, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_workdir_gets_the_config_and_the_same_run_opens_again(tmp_path):
    open_workdir(tmp_path / "a" / "b", CONFIG)
    open_workdir(tmp_path / "a" / "b", CONFIG)
    assert read_config(tmp_path / "a" / "b") == CONFIG
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_another_run_is_refused_with_every_key_and_both_values(tmp_path):
    open_workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_text()
    other = dataclasses.replace(CONFIG, seed=7, data=DataConfig(tokenizer="other.json"), mesh=MeshConfig(fsdp=2))
    message = _refused(tmp_path, other)
    assert "seed was 0 and is 7" in message and "data.tokenizer was 'bytes' and is 'other.json'" in message
    assert "mesh" not in message
    assert (tmp_path / "config.json").read_text() == before


def test_what_may_change_changes_and_is_written(tmp_path, capsys):
    open_workdir(tmp_path, CONFIG)
    training = TrainingConfig(
        num_steps=5, log_every=1, loss_chunk=8, sample_prompt="x", sample_tokens=1, eval_batches=2
    )
    data = DataConfig(num_workers=3, prefetch=1, cache_dir="/c")
    other = dataclasses.replace(CONFIG, training=training, data=data, mesh=MeshConfig(data=1, fsdp=-1))
    open_workdir(tmp_path, other)
    assert read_config(tmp_path) == other
    assert "continuing with" in (out := capsys.readouterr().out) and "training.num_steps 1000 -> 5" in out


def test_accumulation_and_batch_size_are_not_free(tmp_path):
    open_workdir(tmp_path, CONFIG)
    assert "training.grad_accum_steps" in _refused(
        tmp_path, dataclasses.replace(CONFIG, training=TrainingConfig(grad_accum_steps=2))
    )


def test_a_config_from_before_a_key_existed_takes_its_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    open_workdir(tmp_path, Config(seed=3))
    assert json.loads((tmp_path / "config.json").read_text())["training"]["num_steps"] == 1000


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(tmp_path / "file")
    assert "cannot be written (Not a directory)" in _refused(tmp_path / "file" / "below")


def test_a_folder_that_cannot_be_written():
    assert "cannot be written" in _refused("/proc/mtp_jax_run")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"seed": "x"}', '{"sead": 1}', "\x00\xff"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in _refused(tmp_path)


def test_checkpoints_without_a_config_are_not_adopted(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    assert "has checkpoints but no config.json" in _refused(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_only_the_main_process_writes_and_all_check(tmp_path):
    open_workdir(tmp_path / "run", CONFIG, is_main=False)
    assert not (tmp_path / "run").exists()
    open_workdir(tmp_path / "run", CONFIG)
    assert "seed" in _refused(tmp_path / "run", dataclasses.replace(CONFIG, seed=1), is_main=False)


@pytest.mark.parametrize("where, message", [("none", "no such folder"), ("", "has no config.json")])
def test_reading_a_folder_without_a_run(tmp_path, where, message):
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / where)


def test_a_workdir_from_before_keys_had_other_names_is_the_same_run(tmp_path):
    with tarfile.open(CHECKPOINTS / "sequential.tar.xz") as archive:
        archive.extract("./config.json", tmp_path, filter="data")
    old = flat(json.loads((tmp_path / "config.json").read_text()))
    assert "optimizer.muon_steps" in old
    config = read_config(tmp_path)
    assert changes(config, tmp_path) == []
    open_workdir(tmp_path, config)
    new = flat(json.loads((tmp_path / "config.json").read_text()))
    kept = {old_names(Config).get(key, key): value for key, value in old.items()}
    assert {key: new[key] for key in kept} == kept
