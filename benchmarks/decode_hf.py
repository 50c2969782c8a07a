"""Decoding of an exported model with transformers, compiled and with a static cache, beside `benchmarks/decode.py`.

    python -m mtp_jax.tools.convert export --workdir=runs/code_400m --hf=HF --dtype=bfloat16
    python benchmarks/decode_hf.py --hf=HF --batches=1,8

Appends a line per batch size to benchmarks/results/decode.jsonl: milliseconds per token and tokens per second of greedy
decoding, prefill included, the fastest of three runs after two that compile.
"""

import argparse
import datetime
import json
import pathlib
import time

import torch
import transformers

RESULTS = pathlib.Path(__file__).parent / "results" / "decode.jsonl"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--hf", required=True, help="folder of an exported model")
    flags.add_argument("--batches", default="1", help="batch sizes")
    flags.add_argument("--prompt_length", type=int, default=128)
    flags.add_argument("--max_new_tokens", type=int, default=256)
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.bfloat16).to(device).eval()
    for batch in map(int, args.batches.split(",")):
        torch.manual_seed(0)
        prompts = torch.randint(10, model.config.vocab_size, (batch, args.prompt_length), device=device)
        seconds = [generation_seconds(model, prompts, args.max_new_tokens) for _ in range(5)]
        best = min(seconds[2:])
        line = {
            "benchmark": "decode_hf",
            "model": pathlib.Path(args.hf).name,
            "batch_size": batch,
            "num_tokens": batch * args.max_new_tokens,
            "plain_tokens_per_second": batch * args.max_new_tokens / best,
            "plain_ms": 1e3 * best / args.max_new_tokens,
            "compute_dtype": "bfloat16",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.date.today().isoformat(),
        }
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"batch {batch}: {line['plain_ms']:.3f} ms per token, {line['plain_tokens_per_second']:,.0f} tokens/s")


def generation_seconds(model: transformers.PreTrainedModel, prompts: torch.Tensor, max_new_tokens: int) -> float:
    """Returns the seconds of greedy generation with a static cache, which transformers compiles with CUDA graphs."""
    started = time.perf_counter()
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    assert out.shape[1] == prompts.shape[1] + max_new_tokens
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
