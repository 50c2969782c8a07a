"""The generation tasks of eval.py: speculative (the gain of self-speculation) and advice (how many tokens to draft)."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax import language_model
from mtp_jax.config import MeshConfig, UserError, mesh_sizes
from mtp_jax.decoding import draft_length
from mtp_jax.decoding.generator import Generator, check_drafts
from mtp_jax.decoding.samplers import Sampler, make_sampler
from mtp_jax.evaluation import speculative
from mtp_jax.evaluation.results import without_nan
from mtp_jax.interop.checkpoint_folder import is_hf_folder
from mtp_jax.language_model import LanguageModel
from mtp_jax.mtp import kind_of
from mtp_jax.training.workdir import read_config

NUM_PROMPTS = 16
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NUM_NEW, TEMPERATURE = 128, 0.0
OWN_FLAGS = (
    "prompts",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_confidence",
)  # None if not given: other tasks ignore them


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of both tasks; benchmarks share --num_speculative_tokens and --batch_size."""
    group = flags.add_argument_group(
        "speculative, advice",
        "Benchmarks take --num_speculative_tokens and --batch_size; task files have the rest (generation_kwargs).",
    )
    group.add_argument(
        "--prompts", help="a file with one prompt per line, or .jsonl with a field prompt; default: held out"
    )
    group.add_argument(
        "--num_speculative_tokens", type=int, help="tokens drafted per forward pass; default mtp.depth. advice: at most"
    )
    group.add_argument(
        "--min_confidence", type=float, help="speculative: verify drafts only while they are at least so likely"
    )
    group.add_argument("--max_new_tokens", type=int, help=f"after each prompt; default {NUM_NEW}")
    group.add_argument("--batch_size", type=int, help="texts written at once; default 1, benchmarks 16")
    group.add_argument("--temperature", type=float, help="default 0, which is greedy")
    group.add_argument("--top_k", type=int, help="sample from so many of the likeliest tokens")
    group.add_argument("--top_p", type=float, help="sample from the likeliest tokens that have this mass")


def check(args: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Rejects unusable flags before anything is loaded.

    Raises:
      UserError: a number outside its range, missing prompts, or flags that no task of `tasks` reads.
    """
    given = [name for name in OWN_FLAGS if getattr(args, name) is not None]
    if given and not tasks:
        raise UserError(
            f"--{given[0]}={getattr(args, given[0])}: is read by --tasks=speculative,advice only; benchmarks generate "
            "with the generation_kwargs of their task files (for others give a file of your own, with --tasks_dir)"
        )
    if args.num_speculative_tokens is not None and not tasks and not args.speculative:
        raise UserError(
            f"--num_speculative_tokens={args.num_speculative_tokens}: is read by --tasks=speculative,advice, and by "
            "benchmarks with --speculative; leave it out, or add that"
        )
    if args.min_confidence is not None and not 0 <= args.min_confidence <= 1:
        raise UserError(f"--min_confidence={args.min_confidence}: must lie between 0 and 1")
    _sampler(args)
    if args.prompts:
        speculative.read_prompts(args.prompts)
    elif tasks and is_hf_folder(args.workdir):
        raise UserError(
            f"--workdir={args.workdir}: a Hugging Face folder has no held-out documents; give --prompts=FILE"
        )
    for name in ("num_speculative_tokens", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")


def load_model(workdir: str) -> LanguageModel:
    """Returns the model of a workdir or a Hugging Face folder, on one device or on the mesh it was trained on."""
    return language_model.load(workdir, mesh=_mesh(workdir))


def run(args: argparse.Namespace, tasks: Sequence[str], model: LanguageModel) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns each task's text and its values for JSON.

    Args:
      args: the flags of `add_flags`, with limit (the number of prompts).
      tasks: speculative, advice or both.

    Raises:
      UserError: a model that cannot draft, or prompts that cannot be used.
    """
    num_speculative_tokens = args.num_speculative_tokens or kind_of(model.config).depth
    check_drafts(model.config.architecture, max(1, num_speculative_tokens))
    prompts = _prompts(model, args)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens or NUM_NEW, "sampler": _sampler(args)}
    options |= {"seed": model.config.seed, "stop_tokens": model.end_tokens}
    out: dict[str, tuple[str, dict[str, Any]]] = {}
    if "speculative" in tasks:
        result = speculative.measure(
            model.decoder,
            prompts,
            num_speculative_tokens=num_speculative_tokens,
            batch_size=args.batch_size or 1,
            min_confidence=args.min_confidence,
            **options,
        )
        out["speculative"] = speculative.text(result), speculative.as_json(result)
    if "advice" in tasks:
        out["advice"] = _advice(model.decoder, prompts, args, options)
    return out


def _sampler(args: argparse.Namespace) -> Sampler:
    temperature = TEMPERATURE if args.temperature is None else args.temperature
    return make_sampler(temperature, args.top_k, args.top_p)


def _mesh(workdir: str) -> MeshConfig | None:
    """Returns the mesh over which the weights were sharded, if these devices fit it; else None, one device.

    Several processes always have a mesh: that of the training, or the data-parallel one over all devices.
    """
    if is_hf_folder(workdir):
        return None
    mesh = read_config(workdir).mesh
    try:
        sizes = mesh_sizes(mesh, jax.device_count())
    except UserError:  # trained on another number of devices
        return None if jax.process_count() == 1 else MeshConfig()
    is_sharded = sizes["fsdp"] * sizes["expert"] * sizes["context"] * sizes["tensor"] > 1
    return mesh if is_sharded or jax.process_count() > 1 else None


def _advice(decoder: Generator, prompts: list[np.ndarray], args: argparse.Namespace, options: dict[str, Any]):
    most = args.num_speculative_tokens or draft_length.most_drafts(decoder.architecture)
    rates = decoder.generate(
        prompts, num_speculative_tokens=most, batch_size=args.batch_size or 1, **options
    ).acceptance
    costs = draft_length.measure_costs(decoder, BATCH_SIZES, most, prompts[0])
    advised = draft_length.advise(rates, costs)
    values = {
        "acceptance": rates,
        "costs": [dataclasses.asdict(c) | {"speed_up": draft_length.speed_up(rates, c)} for c in costs],
        "advice": [dataclasses.asdict(a) for a in advised],
        "stops_paying_at": draft_length.stops_paying(advised),
    }
    return draft_length.text(rates, costs, advised), without_nan(values)


def _prompts(model: LanguageModel, args: argparse.Namespace) -> list[np.ndarray]:
    if args.prompts:
        texts = speculative.read_prompts(args.prompts)
        return model.prompt_ids(texts[: args.limit or len(texts)])
    num_tokens = model.config.data.sequence_length // 4
    return speculative.held_out_prompts(model.config, args.limit or NUM_PROMPTS, num_tokens)
