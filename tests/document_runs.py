"""Runs of the command and Python blocks of README and documents: the changes that shorten them, or why one is not run.

Each block of a page has one entry here, found by a part of its text. All pages share one folder with `configs`, where
runs/quickstart is the run that the quickstart trains, shortened by TRAIN.
"""

from typing import NamedTuple

# The model and the steps of a run that is only to show that a command works; added to commands of a page where named.
TRAIN = (
    *("--config.training.num_steps=2", "--config.training.log_every=1", "--config.training.eval_batches=1"),
    *("--config.training.sample_tokens=4", "--config.data.source=synthetic", "--config.data.sequence_length=64"),
    *("--config.model.num_layers=3", "--config.model.embed_dim=32", "--config.model.num_experts=4"),
)
# A dense model of next tokens, which compiles faster, where neither experts nor depths matter.
DENSE = (
    *TRAIN,
    *("--config.mtp.kind=none", "--config.model.attention=gqa", "--config.model.num_layers=1"),
    *("--config.model.num_dense_layers=1", "--config.model.num_experts=0", "--config.training.sample_tokens=0"),
)
SWEEP = (*TRAIN, "--config.model.num_layers=6", "--dry_run")  # enough layers for three parallel heads


class Run(NamedTuple):
    """A block.

    part: of its text, in one block of the page.
    changes: (text, replacement) in the block, for placeholders and lengths.
    adds: console script or module of mtp_jax.tools, without mtp- -> flags that are added to each of its commands.
    before, after: Python before and after a Python block, in its namespace.
    num_devices: CPU devices of a command, 1 or 8.
    reason: the block is not run, for this reason.
    """

    part: str
    changes: tuple[tuple[str, str], ...] = ()
    adds: dict[str, tuple[str, ...]] = {}
    before: str = ""
    after: str = ""
    num_devices: int = 1
    reason: str = ""


CI = ".ci/run runs it"
PLACEHOLDERS = (("configs/NAME.py", "configs/tiny.py"), (" [--config.section.key=VALUE ...]", ""))
QUICKSTART = Run("mtp-train --config=quickstart --workdir=runs/quickstart", adds={"train": TRAIN})

RUNS: dict[str, tuple[Run, ...]] = {
    "README.md": (
        Run("make train", reason=CI),
        Run(
            "python train.py --config=configs/NAME.py",
            (*PLACEHOLDERS, ("--workdir=DIR", "--workdir=runs/readme"), (",speculative,advice,BENCHMARK...", ""))
            + ((" [--output=FILE.json] [--limit=N]", " --output=readme.json --limit=1"),),
            {"train": DENSE},
        ),
        Run(">>> import mtp_jax", (("max_new_tokens=64", "max_new_tokens=4"),), after="assert out.texts[0]"),
    ),
    "docs/quickstart.md": (
        Run("make train", reason=CI),
        Run("pip install .", reason="tests/test_package.py builds the wheel, installs it and runs its commands"),
        QUICKSTART,
        Run("mtp-generate --workdir", adds={"generate": ("--max_new_tokens=4",)}),
        Run(">>> import mtp_jax", (("max_new_tokens=64", "max_new_tokens=4"),), after="assert out.texts[0]"),
        Run("mtp-eval --workdir", adds={"eval": ("--limit=1", "--max_new_tokens=4")}),
        Run("--config.mtp.kind=none", adds={"train": DENSE}),
        Run("mtp-sweep", (("--sweep=runs/search", "--sweep=runs"),), {"sweep": SWEEP}),
    ),
    "docs/training.md": (
        Run(
            "python train.py --config=configs/NAME.py",
            (*PLACEHOLDERS, ("--workdir=DIR", "--workdir=runs/training")),
            {"train": DENSE},
        ),
    ),
    "docs/parallelism.md": (
        Run(
            "--config.mesh.context=2",
            adds={"train": DENSE},
            num_devices=8,
        ),
        Run("XLA_FLAGS=", reason="sets the number of devices before jax starts; tests run on eight such devices"),
    ),
    "docs/decoding.md": (
        Run(
            ">>> import mtp_jax",
            (
                ("max_new_tokens=64", "max_new_tokens=4"),
                ("lm.generate(prompts, ", "lm.generate(prompts, max_new_tokens=4, "),
                ("lm.chat(", "list("),  # needs a chat model; tests/test_language_model.py
            ),
            before="prompts = ['def main(', 'import ']",
        ),
        Run("--tasks=speculative,advice", reason="measures for minutes; tests/evaluation/test_speculative.py"),
    ),
    "docs/huggingface.md": (
        Run(
            ">>> import mtp_jax",
            (('"DeepSeek-V3"', '"runs/quickstart"'),),
            before="tokens = [[1, 2, 3, 4]]",
            after="assert lm.logits(tokens).shape[:3] == (1, 2, 3)",
        ),
        Run("convert import --hf=DIR", reason="needs a Hugging Face folder; tests/interop/test_convert.py makes some"),
    ),
    "docs/data.md": (
        Run(
            "config.data.mixture = (",
            before="from mtp_jax.config import default_config, from_dict\nconfig = default_config()",
            after="assert [s.name for s in from_dict(config.to_dict(), '').data.sources] == ['code', 'books', 'chats']",
        ),
        Run(
            "config.data.validation = (",
            before="from mtp_jax.config import default_config, from_dict\nconfig = default_config()",
            after="assert from_dict(config.to_dict(), '').data.validation[0].name == 'news'",
        ),
        Run("configs/chat.py", reason="needs the weights of Qwen3-0.6B; tests/test_training_data.py trains on chats"),
        Run("convert import --hf=DIR", reason="needs a Hugging Face folder; tests/interop/test_convert.py makes some"),
        Run(
            "from mtp_jax.data.documents import documents",
            before="import pyarrow\nfrom mtp_jax.config import DataConfig\nsettings = DataConfig(source='text_files')\n"
            "with pyarrow.CompressedOutputStream('books.jsonl.zst', 'zstd') as file:\n"
            '    file.write(b\'{"text": "a"}\\n{"text": "b"}\\n\')',
            after="assert [document.text for document in found] == ['a', 'b']",
        ),
    ),
    "docs/drafting.md": (
        Run("tools.distill --model", reason="samples and trains for a minute; tests/tools/test_distill.py"),
        Run("tools.draft_vocabulary", reason="needs texts and a tokenizer; tests/tools/test_draft_vocabulary.py"),
        Run('num_speculative_tokens="auto"', reason="measures for a minute; tests/decoding/test_draft_options.py"),
        Run(
            "min_confidence=0.3",
            (("speculative=True", "speculative=True, max_new_tokens=4"),),
            before="import mtp_jax\nlm = mtp_jax.load('runs/quickstart')\nprompts = ['def main(']",
        ),
    ),
    "docs/chat.md": (
        Run(">>> lm = mtp_jax.load", reason="needs a chat model; tests/data/test_chat.py"),
        Run("--tasks=gsm8k", reason="needs a chat model and GSM8K; tests/evaluation/test_chat_benchmarks.py"),
    ),
    "docs/evaluation.md": (
        Run("make eval", reason="needs the data of benchmarks; tests/evaluation/test_harness.py has some"),
        Run("tools.sweep", (("--sweep=runs/search", "--sweep=runs"),), {"sweep": SWEEP}),
    ),
    "docs/planning.md": (Run("tools.plan", reason=f"needs jax[tpu]; tests/tools/test_plan.py, and {CI}"),),
    "docs/extending.md": tuple(
        Run(part, reason="a fragment of a file of mtp_jax; tests/mtp/test_new_kind.py follows the first recipe")
        for part in (
            "class NextLatentConfig",
            "def terms(",
            "class TotalVariation",
            "configured =",
            "KIMI_K2 =",
            "class StopAtLoss",
        )
    ),
    "docs/comparison.md": (Run("pip download", reason="reads a release of another framework from a package registry"),),
    "CONTRIBUTING.md": (Run("make lint", reason=f"{CI}, apart from make test-fast, which is a part of make test"),),
}
