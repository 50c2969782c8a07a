"""Relative errors of 8-bit matmuls and their gradients by the granularity of the scales, on arrays with outliers.

    python benchmarks/fp8_errors.py [--seed=0]

Computed by the numpy oracle (tests/reference/fp8.py), on CPUs alone. Activations have channels 50 times as large as the
others and a few huge values, gradients differ by orders of magnitude between tokens. Prints the error of each whole
product against float64, and the largest error of a single token in dx.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from tests.kernels.test_fp8 import outliers  # noqa: E402
from tests.reference import fp8  # noqa: E402

RECIPES = {
    "one per array": fp8.per_tensor,
    "one per token, one for w (mtp_jax)": fp8.per_token,
    "one per token and per column of w": fp8.per_token_and_column,
    "1 x 128 and 128 x 128 (DeepSeek-V3)": fp8.per_tile,
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    x_ND, w_DF, g_NF = outliers(512, 512, 512, args.seed)
    exact = x_ND @ w_DF, g_NF @ w_DF.T, x_ND.T @ g_NF
    print("| scales | of gradients | y | dx | dw | dx, worst token |\n|---|---|---|---|---|---|")
    for form_name, form in (("e4m3", fp8.E4M3), ("e5m2", fp8.E5M2)):
        for scale in (fp8.power_of_two, fp8.exact):
            for name, recipe in RECIPES.items():
                found = recipe(x_ND, w_DF, g_NF, form, scale)
                whole = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]
                by_token = np.linalg.norm(found[1] - exact[1], axis=1) / np.linalg.norm(exact[1], axis=1)
                errors = " | ".join(f"{100 * error:.2f} %" for error in (*whole, by_token.max()))
                print(f"| {name} | {form_name}, {scale.__name__} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
