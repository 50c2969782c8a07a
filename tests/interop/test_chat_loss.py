"""The loss of chats is that of torch with labels of -100, each conversation alone: in training and in validation."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, trainers

from mtp_jax import data
from mtp_jax.config import ValidationConfig, with_values
from mtp_jax.interop.checkpoint_folder import open_model
from mtp_jax.training.init_from import load_from
from mtp_jax.training.run import global_batches, set_up
from mtp_jax.training.validation import validate
from tests.data.chat_templates import GENERATION, assistant, user
from tests.interop import hf_models
from tests.test_mistakes import scalars

TOLERANCE = 1e-5  # nats, fp32 against fp32; losses are about 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, AFTER = "'<|im_end|>' }}{%- endgeneration %}", "{{- '\\n' }}"  # of an answer in GENERATION
assert END in GENERATION and GENERATION.count(AFTER) == 1
# The template of the model, and one with blocks that hold the same answers, for transformers. In a template without
# blocks an answer ends after its line break.
TEMPLATES = {
    "blocks": (GENERATION, GENERATION),
    "no blocks": (
        re.sub(r"\{%- (end)?generation %\}", "", GENERATION),
        GENERATION.replace(END, "'<|im_end|>\\n' }}{%- endgeneration %}").replace(AFTER, ""),
    ),
}
CHATS = [
    [user("name a prime"), assistant("seven is one")],
    [{"role": "system", "content": "be brief"}, user("and a color?"), assistant("red")],
    [user("one\n\ntwo?"), assistant("three\n"), user("then what"), assistant("four,\nfive and six")],
    [user("hi"), assistant("a"), user("hi"), assistant("a"), user("bye"), assistant("see you then")],
    [user("a long question that has many words in it"), assistant("no")],
    [user("what is the end?"), assistant("the end of a row is not the end of a text"), user("thanks")],
]
REST = [user("what is this " * 3), assistant("the tokens that a packed row lacks")]


@pytest.fixture(scope="module", params=["qwen2_tied", "deepseek_v3", "mimo"])
def reference(request, tmp_path_factory):
    hf_models.needs_torch()
    return hf_models.build(request.param, tmp_path_factory.mktemp(request.param))


def save_tokenizer(folder, template):
    """Fewer than 96 ids, some of them of several characters."""
    made = tokenizers.Tokenizer(models.BPE())
    texts = [m["content"] for chat in [*CHATS, REST] for m in chat] + ["system\n", "user\n", "assistant\n"]
    made.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False))
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


def labelled(folder, template):
    """(ids, labels) of each conversation, int64[n]; -100 on every token that the assistant did not write."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template)
    out = []
    for chat in CHATS:
        found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, is_answer = np.array(found["input_ids"]), np.array(found["assistant_masks"]) == 1
        assert is_answer.any() and not is_answer.all() and ids.max() < 96
        out.append((ids, np.where(is_answer, ids, -100)))
    return out


def sums_of(reference, ids, labels):
    """(summed loss, number of labels) of each depth of one conversation in torch, float64[1 + D] and int64[1 + D]."""
    import torch

    logits = torch.tensor(reference.logits(ids[None])[0], dtype=torch.float64)
    losses, counts = [], []
    for k in range(logits.shape[1]):
        targets = torch.tensor(labels[1 + k :])
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets), k], targets, reduction="sum").item())
        counts.append(int((targets != -100).sum()))
    with torch.no_grad():  # transformers' own loss of its model
        own = reference.model(torch.tensor(ids[None]), labels=torch.tensor(labels[None])).loss.item()
    assert own == pytest.approx(losses[0] / counts[0], rel=1e-6)
    return np.array(losses), np.array(counts)


def expected(reference, conversations):
    """(loss divided by the labels of depth 0, loss divided by those of its depth, labels), of each depth."""
    losses, counts = (np.sum(each, 0) for each in zip(*(sums_of(reference, *c) for c in conversations), strict=True))
    return losses / counts[0], losses / counts, counts


def config_of(reference, path, packing, length):
    """The model of the folder, to be trained on all chats in one batch and validated on them."""
    # Packed rows lack the last tokens of a stream, here those of a conversation that is not compared.
    chats = CHATS if packing == "whole" else [*CHATS, REST]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = {"source": "text_files", "files": str(path), "records": "chat", "packing": packing}
    config = with_values(
        open_model(reference.folder).config,
        {
            **{f"data.{name}": value for name, value in source.items()},
            **{"data.tokenizer": str(reference.folder), "data.cache_dir": str(path.parent / "cache")},
            **{"data.validation_fraction": 0.0, "data.shuffle": False, "data.sequence_length": length},
            **{"data.batch_size": 1, "init_from": str(reference.folder), "model.compute_dtype": "float32"},
        },
    )
    config = replace(config, data=replace(config.data, validation=(ValidationConfig(name="same", **source),)))
    num_rows = len(data.prepare(config).rows("train"))
    return with_values(config, {"data.batch_size": num_rows})


@pytest.mark.parametrize(("template", "packing"), [("blocks", "whole"), ("no blocks", "packed")])
def test_the_loss_is_that_of_each_conversation_alone(reference, template, packing, tmp_path):
    own, marked = TEMPLATES[template]
    save_tokenizer(reference.folder, own)
    conversations = labelled(reference.folder, marked)
    lengths = [len(ids) for ids, _ in conversations]
    length = sum(lengths) if packing == "packed" else sum(lengths) // 2
    assert length > max(lengths)
    run = set_up(config_of(reference, tmp_path / "chats.jsonl", packing, length), num_devices=1)
    assert run.config.data.batch_size == {"packed": 1, "whole": 3}[packing]  # rows with several conversations each
    with jax.set_mesh(run.mesh):
        state, _ = load_from(run.config.init_from, run.config, run.trainer.init(), run.trainer.abstract_state)
        validated = validate(run, state, 1)["same"]
        _, metrics = run.trainer.step(state, next(global_batches(run, "train")))
    metrics = scalars(metrics)
    trained = np.array([metrics["loss_main"], *(metrics[f"loss_mtp_{r.depth}"] for r in validated[1:])])
    of_main, of_own, counts = expected(reference, conversations)
    assert [r.num_targets for r in validated] == counts.tolist()
    np.testing.assert_allclose([r.loss for r in validated], of_own, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(trained, of_main, rtol=0, atol=TOLERANCE)

    # A mask that is shifted by one token, and a token of a prompt that counts, are seen.
    shifted = [(ids, np.where(np.roll(labels, 1) != -100, ids, -100)) for ids, labels in conversations]
    (ids, labels), *others = conversations
    assert labels[3] == -100
    with_prompt = [(ids, np.where(np.arange(len(ids)) == 3, ids, labels)), *others]
    for wrong in (shifted, with_prompt):
        assert np.abs(trained - expected(reference, wrong)[0]).max() > 100 * TOLERANCE
