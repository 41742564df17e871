"""How close the model is to the published implementation: ``python benchmarks/parity.py`` prints the README's table.

Needs the golden arrays in tests/golden; every row is the worst over all scenarios that have the array.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from published import intermediate_errors, loss_and_gradients, to_hf_names  # noqa: E402
from support import CASES, GOLDEN, INFERENCE, TRAINING, golden, relative_error  # noqa: E402

import lmm_jax  # noqa: E402
from conversion.__main__ import main as convert  # noqa: E402
from lmm_jax.models.llava_mini import LlavaMini  # noqa: E402


def measure() -> dict[str, tuple[float, int]]:
    """Quantity -> worst relative error (norm of the difference over the norm), number of scenarios."""
    worst: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for case in CASES:
            with contextlib.redirect_stdout(sys.stderr):
                assert convert(["from-hf", str(GOLDEN / case / "hf"), f"{folder}/{case}"]) == 0
            models[case] = lmm_jax.load(f"{folder}/{case}")
        for case, scenario in INFERENCE:
            errors, same = inference(models[case], golden(case, scenario))
            for name, error in errors.items():
                worst[name].append(error)
            worst["greedy tokens that differ"].append(1.0 - same)
        for case, scenario in TRAINING:
            loss, gradients = training(models[case], golden(case, scenario))
            worst["loss"].append(loss)
            worst["gradients"].append(max(gradients.values()))
    return {name: (max(errors), len(errors)) for name, errors in worst.items()}


def inference(model, expected) -> tuple[dict[str, float], float]:
    """Errors by array, share of equal greedy tokens."""
    errors = intermediate_errors(model, expected)
    inputs = expected["input_ids"], expected["attention_mask"], expected.get("pixel_values")
    tokens = model.generate(*inputs, max_new_tokens=expected["greedy_tokens"].shape[1])
    return errors, float(np.mean(tokens == expected["greedy_tokens"]))


def training(model, expected) -> tuple[float, dict[str, float]]:
    """Error of the loss, errors of the gradients by parameter."""
    loss, _, _, gradients = loss_and_gradients(LlavaMini(model.config), model.engine.params, expected)
    ours = to_hf_names(model.config, gradients)
    published = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
    errors = {name: relative_error(ours[name], g) for name, g in published.items()}
    return relative_error(loss, expected["loss"][0]), errors


def main() -> None:
    """Prints Markdown, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    rows = measure()
    if as_json:
        print(json.dumps({"jax": jax.__version__, "platform": jax.default_backend(), "worst": rows}, indent=2))
        return
    print("| compared with the published PyTorch code, float32 | scenarios | worst relative error |")
    print("|---|---|---|")
    for name, (error, count) in rows.items():
        print(f"| {name.replace('_', ' ')} | {count} | {error:.1e} |" if error else f"| {name} | {count} | 0 |")


if __name__ == "__main__":
    main()
