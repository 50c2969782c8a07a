"""Distillation as a command: from a small trained model to one whose modules draft more of its text."""

import json
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mtp_jax
from mtp_jax.config import Config, UserError, with_values
from mtp_jax.tools import distill
from mtp_jax.tools.distilling import answers, recipe
from mtp_jax.training.checkpoint import Checkpoints
from tests.decoding.trained import train_small

QUICK = [
    *("--max_new_tokens=40", "--measured_tokens=24", "--held_out=4", "--batch_size=16", "--epochs=40"),
    *("--config.optimizer.learning_rate=3e-3", "--config.training.log_every=100"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with one sequential module, and prompts of two domains."""
    folder = tmp_path_factory.mktemp("base")
    workdir = train_small(folder, **{"model.attention": "mla", "mtp.depth": 1, "training.num_steps": 60})
    (folder / "cafes.txt").write_text("".join(f"the café is open → {name}\n" for name in ("Ann", "Bob", "Eve")) * 6)
    lines = [json.dumps({"prompt": f"the {place}"}) + "\n" for place in ("station", "library")] * 8
    (folder / "places.jsonl").write_text("".join(lines))
    return workdir, [f"--prompts={folder / 'cafes.txt'}", f"--prompts=places={folder / 'places.jsonl'}"]


@pytest.fixture(scope="module")
def distilled(base, tmp_path_factory):
    workdir, prompts = base
    out = tmp_path_factory.mktemp("out") / "run"
    distill.main([f"--model={workdir}", f"--workdir={out}", *prompts, *QUICK])
    return out


def leaves(workdir, part):
    with Checkpoints(workdir / "checkpoints") as saved:
        _, arrays = saved.open_part((part,))
        return {".".join(path): np.asarray(leaf[...]) for path, leaf in flatten_dict(arrays[part]).items()}


def test_more_drafts_are_accepted_in_every_domain(distilled):
    result = json.loads((distilled / "distill.json").read_text())
    for domain in ("cafes", "places"):
        before, after = (result[when][domain] for when in ("before", "after"))
        assert before["num_speculative_tokens"] == after["num_speculative_tokens"] == 3
        assert after["tokens_per_forward"] > before["tokens_per_forward"]
        assert after["num_same"] == after["num_prompts"] == 4  # the text is that of the model


def test_the_decoder_is_the_same_and_has_no_optimizer_state(base, distilled):
    old, new = leaves(base[0], "params"), leaves(distilled, "params")
    decoder = [name for name in old if name.startswith("trunk")]
    assert decoder and all(np.array_equal(old[name], new[name]) for name in decoder)
    assert any(not np.array_equal(old[name], new[name]) for name in old if name.startswith("mtp"))
    moments = leaves(distilled, "opt_state")
    assert any("mtp" in name for name in moments) and not any("trunk" in name for name in moments)


def test_answers_are_the_model_s_own_and_prompts_have_no_weight(base, distilled):
    found = list(answers.read(distilled / "answers"))
    assert len(found) == 18 - 4 + 16 - 4
    lm = mtp_jax.load(base[0])
    for ids, weights in found:
        start = int(np.argmax(weights))
        prompt, answer = lm.tokenizer.decode(ids[:start]), ids[start:]
        assert weights[:start].sum() == 0 and (weights[start:] == 1).all() and len(answer)
        assert prompt.startswith("the ") and len(answer) <= 40


def test_a_continued_run_generates_only_what_is_missing(base, distilled, tmp_path, capsys):
    workdir, prompts = base
    again = tmp_path / "again"
    shutil.copytree(distilled / "answers", again / "answers")
    shutil.copy(distilled / "before.json", again / "before.json")
    first, second = sorted((again / "answers").glob("part-*"))
    whole, first_time = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    distill.main([f"--model={workdir}", f"--workdir={again}", *prompts, *QUICK, "--epochs=1", "--draft_vocabulary=24"])
    assert second.read_bytes() == whole and first.stat().st_mtime_ns == first_time
    assert (again / "before.json").read_bytes() == (distilled / "before.json").read_bytes()
    # The tokens of the answers are few, and the text is the model's whatever is drafted.
    assert len(mtp_jax.load(again).draft_vocabulary) == 24
    reduced = json.loads((again / "distill.json").read_text())["after, 24 tokens"]
    assert all(each["num_same"] == 4 and each["draft_vocabulary_size"] == 24 for each in reduced.values())
    with pytest.raises(UserError, match="--temperature=0.5: .* has answers with temperature=1.0; use that"):
        distill.main([f"--model={workdir}", f"--workdir={again}", *prompts, *QUICK, "--temperature=0.5"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kind=top"], "--kind=top: drafts nothing"),
        (["--kind=nextlat"], "mtp.loss=end_to_end_tv: of no effect with mtp.kind=nextlat"),
        (["--held_out=40"], "holds 18 prompts of at most 56 tokens"),
        (["--epochs=0"], "--epochs=0.0: must be above 0"),
        (["--prompts=cafes=nowhere.txt"], "there is another file for the domain cafes"),
        (["--prompts=nowhere.txt"], "--prompts=nowhere.txt: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_one_line(base, tmp_path, flags, words):
    workdir, prompts = base
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        distill.main([f"--model={workdir}", f"--workdir={tmp_path / 'out'}", *prompts, *QUICK, *flags])
    assert not (tmp_path / "out").exists()


def changes(drafts, wanted="", **source):
    """The recipe for a model with these settings, and whether its modules are trained further."""
    settings = recipe.Recipe(wanted, drafts, "tv", 1.0, 3.0)
    return recipe.mtp_changes(settings, with_values(Config(), {f"mtp.{k}": v for k, v in source.items()}))


def test_the_modules_of_the_model_decide_what_is_trained():
    new, is_trained = changes(3)
    assert not is_trained and (new["mtp.kind"], new["mtp.depth"], new["mtp.shared_depths"]) == ("sequential", 3, True)
    one, is_trained = changes(3, kind="sequential", depth=1)
    assert is_trained and one["mtp.shared_depths"] and one["mtp.depth"] == 3
    own, is_trained = changes(3, kind="sequential", depth=2)
    assert is_trained and "mtp.depth" not in own
    heads, is_trained = changes(2, "parallel")
    assert not is_trained and heads["mtp.depth"] == 2 and not heads["mtp.shared_depths"]
    matched, _ = changes(3, "sequential", kind="parallel", depth=2)
    assert matched["model.num_layers"] == Config().model.num_layers - 2  # the layers that the main model has
    with pytest.raises(UserError, match="--num_speculative_tokens=3: the model has 2 parallel heads.*at most 2"):
        changes(3, kind="parallel", depth=2)
