"""Rate at which a corpus is tokenised, beside `datasets.map` with the same tokenizer.

    python benchmarks/prepare.py --files='books/*.txt' --tokenizer=PATH/tokenizer.json [--megabytes=400] [--cpus=2]

Writes JSON lines of the texts, repeated up to the size, into a temporary folder; then, in processes of their own and in
turn, prepares them with `mtp_jax.data.prepare`, opens the cache again, and maps them with the package `datasets`
(batched, one process per CPU). Rates are megabytes of text per second and CPU, with the start of the processes; memory
is the largest resident set of any process and the sum over the process tree at its peak, without mapped files. Appends
a line to benchmarks/results/prepare.jsonl.
"""

import argparse
import datetime
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

if __package__ in (None, ""):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measuring  # noqa: E402

OURS = """
import sys
from mtp_jax.config import load_config
from mtp_jax.data import prepare
corpus = prepare(load_config("configs/tiny.py", sys.argv[1:]))
print(corpus.num_tokens("train"))
"""
THEIRS = """
import sys
import datasets, tokenizers
files, path, num_proc, cache = sys.argv[1:]
def main():
    tokenizer = tokenizers.Tokenizer.from_file(path)
    def encode(batch):
        return {"ids": [each.ids for each in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=int(num_proc), remove_columns=data.column_names)
    print(sum(map(len, data.with_format("numpy")["ids"][:100])))
if __name__ == "__main__":
    main()
"""


def write_lines(pattern: str, path: pathlib.Path, megabytes: int) -> int:
    """Writes paragraphs of about 4,000 characters as JSON lines; returns the bytes of text."""
    texts = [pathlib.Path(name).read_text(encoding="utf-8") for name in sorted(glob.glob(pattern, recursive=True))]
    pieces = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    size = number = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            for piece in pieces:
                text = f"{number}\n{piece}"  # no two documents are equal
                number += 1
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 10**6:
                    break
    return size


def timed(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Runs a command; returns seconds, and peak memory in GiB of one process and of all of them."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks = {"one": 0.0, "all": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            sizes = [size / 2**30 for size in resident(process.pid)]
            peaks["one"], peaks["all"] = max(peaks["one"], *sizes, 0.0), max(peaks["all"], sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(err[-2000:])
    return {
        "seconds": round(time.monotonic() - start, 2),
        "peak_gib_of_a_process": round(peaks["one"], 2),
        "peak_gib": round(peaks["all"], 2),
    }


def resident(pid: int) -> list[int]:
    """Returns the resident bytes, without mapped files, of a process and its descendants."""
    out, waiting = [], [pid]
    while waiting:
        each = waiting.pop()
        try:
            status = pathlib.Path(f"/proc/{each}/status").read_text()
            waiting += map(int, pathlib.Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
        out += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")]
    return out


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--files", required=True)
    flags.add_argument("--tokenizer", required=True)
    flags.add_argument("--megabytes", type=int, default=400)
    flags.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    flags.add_argument("--only", choices=["ours", "datasets"], default="")
    flags.add_argument("--output", default="benchmarks/results/prepare.jsonl")
    args = flags.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])
    env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "HF_DATASETS_OFFLINE": "1"}
    line: dict[str, object] = {"benchmark": "prepare", "cpus": args.cpus}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "texts.jsonl"
        size = write_lines(args.files, path, args.megabytes)
        line["megabytes"] = size // 10**6
        ours = ["--config.data.source=text_files", f"--config.data.files={path}", "--config.data.validation_fraction=0"]
        ours += [f"--config.data.tokenizer={args.tokenizer}", f"--config.data.cache_dir={folder}/ours"]
        if args.only != "datasets":
            line["ours"] = timed([sys.executable, "-c", OURS, *ours], env)
            line["ours_again"] = timed([sys.executable, "-c", OURS, *ours], env)
        if args.only != "ours":
            script = pathlib.Path(folder) / "theirs.py"
            script.write_text(THEIRS)
            theirs = [str(path), args.tokenizer, str(args.cpus), f"{folder}/theirs"]
            line["datasets"] = timed([sys.executable, str(script), *theirs], env)
    for name in ("ours", "datasets"):
        found = line.get(name)
        if isinstance(found, dict):
            found["megabytes_per_second_and_cpu"] = round(size / 1e6 / found["seconds"] / args.cpus, 2)
    line |= {"commit": measuring.commit(), "date": datetime.date.today().isoformat()}
    measuring.write_line(pathlib.Path(args.output), line)


if __name__ == "__main__":
    main()
