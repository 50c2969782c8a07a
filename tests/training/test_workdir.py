"""A workdir belongs to one run: what may change when it continues, and what is refused in one clear line."""

import dataclasses
import json
import tarfile

import pytest

from mtp_jax import storage
from mtp_jax.config import Config, DataConfig, MeshConfig, MTPConfig, TrainingConfig, UserError
from mtp_jax.config.aliases import old_names
from mtp_jax.data import ByteTokenizer, prepare
from mtp_jax.training.workdir import changes, check_data, flat, open_workdir, read_config
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
def test_a_corrupt_config_is_named(tmp_path, text):
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


@pytest.fixture
def corpus(tmp_path):
    """Makes the corpus of some texts, in a cache of its own."""

    def make(*texts, **settings):
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        settings = {"source": "text_files", "files": str(tmp_path / "*.txt"), **settings}
        data = DataConfig(cache_dir=str(tmp_path / "cache"), batch_size=1, sequence_length=8, **settings)
        return prepare(Config(data=dataclasses.replace(data, validation_fraction=0.0)))

    return make


@pytest.fixture(params=["local", "gs"])
def workdir(request, tmp_path):
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket").url + "/run"


def test_a_run_continues_on_its_data_only(corpus, workdir):
    before = corpus("one text " * 9)
    open_workdir(workdir, before.config)
    check_data(workdir, before)
    check_data(workdir, corpus("one text " * 9))
    with pytest.raises(UserError) as error:
        check_data(workdir, corpus("one text " * 9, "more"))
    message = str(error.value)
    assert "the text of text_files was 1 documents of 81 bytes and is 2 documents of 85 bytes" in message
    path = storage.path(workdir) / "data.json"
    assert message.endswith(f"or remove {path} to go on with the new ones") and "\n" not in message
    storage.remove(path)
    check_data(workdir, corpus("one text " * 9, "more"))


def test_a_run_continues_with_its_tokenizer_only(corpus, tmp_path):
    before = corpus("one text " * 9)
    open_workdir(tmp_path / "run", before.config)
    check_data(tmp_path / "run", before, is_main=False)
    assert not (tmp_path / "run" / "data.json").exists()
    check_data(tmp_path / "run", before)
    other = dataclasses.replace(before, tokenizer=ByteTokenizer())
    other.tokenizer.fingerprint = "other"
    with pytest.raises(UserError, match="holds a run on other data: the tokenizer bytes has other ids; restore them"):
        check_data(tmp_path / "run", other)


def test_a_workdir_in_an_object_store(bucket):
    open_workdir(bucket.url + "/a/run", CONFIG)
    open_workdir(bucket.url + "/a/run", CONFIG)
    assert read_config(bucket.url + "/a/run") == CONFIG and list(bucket.objects()) == ["a/run/config.json"]
    assert "seed was 0 and is 1" in _refused(bucket.url + "/a/run", dataclasses.replace(CONFIG, seed=1))
    for where, message in (("", "has no config.json"), ("/none", "no such folder")):
        with pytest.raises(UserError, match=message):
            read_config(f"{bucket.url}/a{where}")
    with pytest.raises(UserError, match="cannot be written .no such bucket."):
        open_workdir("gs://no-such-bucket/run", CONFIG)


def test_a_name_that_is_too_long(tmp_path):
    assert "cannot be written (File name too long)" in _refused(tmp_path / ("x" * 300))
