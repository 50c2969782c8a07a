"""Config from a config file and the command line; old names of keys; lists of sections."""

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass

import ml_collections
import pytest

from mtp_jax.config import Config, UserError, default_config, from_dict, load_config
from mtp_jax.config.aliases import current_key, old_names
from mtp_jax.config.fields import check_bounds, key_hints, setting, value_of, walk, with_values
from mtp_jax.config.load import build, override, to_config_dict, to_dict
from mtp_jax.training.workdir import flat


@dataclass(frozen=True)
class Source:
    name: str
    weight: float = setting(1.0, above=0, at_most=10)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inner:
    steps: int = setting(5, at_least=1, at_most=9, was="data.inner_steps")


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = ()
    inner: Inner = Inner()
    limit: int | None = None


@dataclass(frozen=True)
class Root:
    data: Data = Data()
    num_steps: int = setting(1, was="steps")


TWO = Root(Data((Source("a"), Source("b", 2.0, ("x", "y")))))


def refused(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ctrl_c_in_a_config_file_is_no_mistake_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_config(str(tmp_path / "mine.py"))


def test_a_list_of_sections_survives_every_form():
    assert build(Root, to_dict(TWO), "here") == TWO
    assert build(Root, json.loads(json.dumps(to_dict(TWO))), "here") == TWO
    assert build(Root, to_config_dict(TWO).to_dict(), "here") == TWO
    assert hash(build(Root, to_dict(TWO), "here")) == hash(TWO)


def test_a_config_file_sets_a_list_of_sections():
    config = to_config_dict(Root())
    config.data.sources = (dict(name="a"), ml_collections.ConfigDict(dict(name="b", weight=2, files=["x", "y"])))
    assert build(Root, config.to_dict(), "here") == TWO


@pytest.mark.parametrize("key", ["data.sources[1].weight", "data.sources.1.weight"])
def test_the_command_line_sets_one_key_of_one_section(key):
    config = override(TWO, [f"--config.{key}=3"])
    assert [source.weight for source in config.data.sources] == [1.0, 3.0]
    assert current_key(key, Root) == "data.sources[1].weight"


def test_the_command_line_sets_a_whole_list():
    config = override(TWO, ["--config.data.sources=[{'name': 'c', 'weight': 4}]", "--config.data.sources[0].weight=5"])
    assert config.data.sources == (Source("c", 5.0),)


def test_keys_of_a_list_are_walked_and_flattened_alike():
    keys = [key for key, _, _ in walk(TWO)]
    assert "data.sources[1].weight" in keys and "data.sources" not in keys
    assert list(flat(to_dict(TWO))) == keys == list(flat(json.loads(json.dumps(to_dict(TWO)))))


NAME = {"name": "a"}
MISTAKES = {
    "data.sources[1].weight='x' (in here): must be of type float": {"sources": [NAME, {"name": "b", "weight": "x"}]},
    "data.sources[1].wieght: no such config key (in here); did you mean data.sources[0].weight": {
        "sources": [NAME, {"name": "b", "wieght": 1.0}]
    },
    "data.sources[1]=3 (in here): is a section": {"sources": [NAME, 3]},
    "data.sources[1].name (in here): is missing": {"sources": [NAME, {}]},
    "data.sources={'name': 'a'} (in here): must be a tuple of Source, as in [{...}": {"sources": NAME},
    "data.sources[0].files[1]=2 (in here): must be of type str": {"sources": [NAME | {"files": ("x", 2)}]},
    "data.inner=3 (in here): is a section": {"inner": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_list_of_sections_is_named(message):
    assert refused(build, Root, {"data": MISTAKES[message]}, "here").startswith(message)


def test_bounds_inside_a_list():
    wrong = dataclasses.replace(TWO, data=Data((Source("a"), Source("b", -1.0))))
    assert refused(check_bounds, wrong) == "data.sources[1].weight=-1.0: must be above 0"


def test_an_index_outside_the_list():
    message = refused(override, TWO, ["--config.data.sources[2].weight=1"])
    assert message == "data.sources[2].weight=1: data.sources has 2 entries; set data.sources as a whole"


@pytest.fixture
def notes(monkeypatch, capsys):
    monkeypatch.setattr("mtp_jax.config.aliases._warned", set())
    return lambda: capsys.readouterr().err.splitlines()


NOTE = "note: data.inner_steps is now data.inner.steps; the next release drops the old ones"


def test_an_old_name_in_a_dict(notes):
    values = {"data": {"inner_steps": 7}, "steps": 3}
    for _ in range(2):
        assert build(Root, values, "here") == Root(Data(inner=Inner(7)), 3)
    assert values == {"data": {"inner_steps": 7}, "steps": 3}
    (line,) = notes()
    assert "data.inner_steps is now data.inner.steps, steps is now num_steps" in line


def test_an_old_name_on_the_command_line(notes):
    assert override(Root(), ["--config.data.inner_steps=7"]).data.inner.steps == 7
    assert notes() == [NOTE]


def test_an_old_name_as_attribute_of_the_config_dict(notes):
    config = to_config_dict(Root())
    config.data.inner_steps = 7
    config.data.inner_steps += 1
    config.steps = 3
    assert config.data.inner.steps == config.data["inner_steps"] == 8
    assert build(Root, config.to_dict(), "here") == Root(Data(inner=Inner(8)), 3)
    with pytest.raises(AttributeError):
        config.data.inner_stepz = 7
    with pytest.raises(TypeError):
        config.data.inner_steps = "many"
    assert notes()[0] == NOTE


def test_an_old_and_the_new_name():
    both = {"data": {"inner_steps": 7, "inner": {"steps": 7}}}
    expected = "data.inner_steps and data.inner.steps (in here): two names of one key; use data.inner.steps"
    assert refused(build, Root, both, "here") == expected
    overrides = ["--config.data.inner.steps=7", "--config.data.inner_steps=8"]
    assert "two names of one key; use data.inner.steps" in refused(override, Root(), overrides)


@pytest.mark.parametrize("old", old_names(Config))
def test_every_old_name_reaches_its_field(old):
    new = old_names(Config)[old]
    before = value_of(Config(), new)
    choices = typing.get_args(key_hints(Config)[new])
    value = choices[-1] if choices else not before if isinstance(before, bool) else type(before)(7)
    wanted = with_values(Config(), {new: value})
    *parents, name = old.split(".")
    config = default_config()
    setattr(functools.reduce(getattr, parents, config), name, value)
    assert from_dict(config.to_dict(), "here") == override(Config(), [f"--config.{old}={value}"]) == wanted
    assert from_dict(functools.reduce(lambda below, part: {part: below}, reversed(old.split(".")), value), "") == wanted


def test_renamed_values_are_understood(tmp_path, capsys):
    """On the command line, in a config file and in config.json, with one notice."""
    file = tmp_path / "old.py"
    file.write_text(
        "from mtp_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.model.attention_kernel = 'mosaic'\n    return config\n"
    )
    assert load_config(str(file), []).model.attention_kernel == "pallas_hopper"
    assert "model.attention_kernel=mosaic is now pallas_hopper" in capsys.readouterr().err
    found = load_config("configs/tiny.py", ["--config.model.expert_kernel=mosaic"])
    assert found.model.expert_kernel == "pallas_hopper"
    values = to_dict(found)
    values["model"]["expert_kernel"] = "mosaic"
    assert from_dict(values, "config.json") == found
    assert load_config("configs/tiny.py", ["--config.mtp.chain=trunk"]).mtp.chain == "decoder"
