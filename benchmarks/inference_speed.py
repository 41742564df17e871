"""How fast questions are answered, beside plain PyTorch:

    python benchmarks/inference_speed.py --torch-python /path/to/python

prints a Markdown table and writes benchmarks/inference_speed.json. The other interpreter needs torch and transformers; it runs
benchmarks/inference_speed_torch.py on the model of torch_model.py. Both have the same random weights (vision encoder of width
512 with 12 layers at 336 pixels, decoder of width 1024 with 12 layers, 4 pre-fusion layers, one vision token), compute in
float32 on the processor, start from uint8 pixels, and must give the same tokens. They take turns within one run, on a machine
that should have nothing else to do. Peak memory is of processes of their own, which do one thing each. Beside the times stands
how many more matrix products the other side has to do, by count: so much faster we are where both do theirs as fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from machine import machine, peak_bytes, threads  # noqa: E402
from twin import Theirs  # noqa: E402

from lmm_jax import checkpoint, sharding  # noqa: E402
from lmm_jax.analysis import flops  # noqa: E402
from lmm_jax.config import IMAGE_TOKEN_ID, CompressorConfig, DecoderConfig, ModelConfig, VisionConfig  # noqa: E402
from lmm_jax.inference.compiling import use_compilation_cache  # noqa: E402
from lmm_jax.inference.engine import MAX_BATCH, Engine, Request  # noqa: E402
from lmm_jax.inference.loading import load_params, share_heaps  # noqa: E402
from lmm_jax.inference.sampling import Sampling  # noqa: E402
from lmm_jax.models.llava_mini import abstract_params, init_params  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
MODEL = ModelConfig(
    VisionConfig(512, 2048, 12, 8),
    DecoderConfig(32000, 1024, 2816, 12, 16, 16, 64, max_position_embeddings=2048),
    CompressorConfig(1),
    prefusion_layers=4,
)
PICTURES, QUESTIONS, TEXT, FRAMES = 16, 64, 45, 32
NEW, LONG = 16, 64  # tokens of each of many answers, and of a long one
MANY, ONE = 2**29, 20 * 2**20  # bytes for all pictures, and for one


@dataclasses.dataclass(frozen=True)
class Case:
    """What both are asked for.

    Attributes:
      label: in the table.
      line: for the other side, see inference_speed_torch.py.
      cache_bytes: for pictures that ours may remember.
      rows: that ours generates at once, at most.
    """

    label: str
    line: str
    cache_bytes: int = 0
    rows: int = MAX_BATCH


CASES = {
    "first": Case("picture and question to first token", "ask 0 0 1"),
    "again": Case("another question on the picture", "ask 0 1 1", MANY),
    "video": Case(f"video of {FRAMES} frames to first token", "video 0 1"),
    "decode": Case(f"{LONG - 1} further tokens", f"decode 0 {LONG}"),
    "mixed": Case(f"{QUESTIONS} questions over {PICTURES} pictures, {NEW} tokens each", f"mixed {NEW}", MANY),
    "few": Case("the same, four at once, one picture kept", f"mixed {NEW}", ONE, rows=4),
}


class Ours:
    """The engine and what it is asked."""

    def __init__(self, folder: Path) -> None:
        """Loads what `prepare` wrote."""
        share_heaps()
        use_compilation_cache()
        mesh = sharding.make_mesh()
        params = load_params(folder / "model", abstract_params(MODEL, mesh, jnp.float32), mesh)
        self.engines = {
            size: Engine(MODEL, params, mesh, dtype=jnp.float32, prefix_cache_bytes=size) for size in (0, MANY, ONE)
        }
        with np.load(folder / "inputs.npz") as inputs:
            self.pictures, self.questions = inputs["pictures"][:, None], inputs["questions"].astype(np.int32)
            self.video = list(inputs["video"][:, None])

    def run(self, name: str) -> dict[str, Any]:
        """Seconds and tokens, as the other side gives them."""
        case, each = CASES[name], QUESTIONS // PICTURES
        engine = self.engines[case.cache_bytes]

        def request(question: int, media: Any, new: int) -> Request:
            return Request(self.questions[question], [media], Sampling(new))

        engine.images.prefixes.clear()
        if name == "again":  # question 0 came before
            engine.generate([request(0, self.pictures[0], 1)], ())
        start = time.perf_counter()
        if case.line.startswith("mixed"):
            asked = [request(q, self.pictures[q // each], NEW) for q in range(QUESTIONS)]
            done = dict(engine.as_completed(asked, (), case.rows))
            tokens = [done[q] for q in range(QUESTIONS)]
        elif name == "decode":
            stream = engine.stream(request(0, self.pictures[0], LONG), ())
            tokens, start = [next(stream)], time.perf_counter()
            tokens += list(stream)
        else:
            media = self.video if name == "video" else self.pictures[0]
            (tokens,) = engine.generate([request(int(name == "again"), media, 1)], ())
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def main() -> None:
    """Prepares, checks that both do the same, measures, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side in each case (7); 0: memory only")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases; others stay as recorded (all)")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        Ours(Path(args.peak[1])).run(args.peak[0])
        print(peak_bytes())
        return
    if not args.torch_python:
        parser.error("--torch-python is needed")
    known = json.loads(RESULT.read_text())["cases"] if RESULT.exists() else {}
    if not args.rounds and (missing := set(args.only) - known.keys()):
        parser.error(f"--rounds 0 adds memory to recorded times, and there are none of {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        found = {name: known.get(name, {}) for name in args.only}
        if args.rounds:
            ours, theirs = Ours(folder), Theirs(args.torch_python, "inference_speed_torch.py", folder)
            how = {"rounds": args.rounds, "machine": machine("jax", "jaxlib", "flax") | theirs.versions}
            how["date"] = datetime.date.today().isoformat()
            found = {name: measure(name, ours, theirs, args.rounds) | how for name in args.only}
            theirs.close()
            del ours
        for name, figures in found.items():
            figures["peak_bytes"] = peaks(name, folder, args.torch_python)
    print(markdown(found))
    RESULT.write_text(json.dumps({"model": dataclasses.asdict(MODEL), "cases": known | found}, indent=2) + "\n")


def prepare(folder: Path) -> None:
    """Weights for both sides, and what they are asked."""
    from published import to_hf_names  # not where memory is measured

    params = init_params(MODEL, sharding.make_mesh())
    checkpoint.write_model(folder / "model", MODEL, checkpoint.unstack(params))
    np.savez(folder / "weights.npz", **to_hf_names(MODEL, params))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(MODEL)))
    rng, side = np.random.default_rng(0), MODEL.vision.image_size
    questions = rng.integers(10, MODEL.decoder.vocab_size, (QUESTIONS, TEXT + 1))
    questions[:, 5] = IMAGE_TOKEN_ID
    pictures = rng.integers(0, 256, (PICTURES + FRAMES, side, side, 3), np.uint8)
    np.savez(folder / "inputs.npz", pictures=pictures[:PICTURES], video=pictures[PICTURES:], questions=questions)


def measure(name: str, ours: Ours, theirs: Theirs, rounds: int) -> dict[str, Any]:
    """Warms up, makes sure that both say the same, and lets them take turns."""
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "jax": lambda: ours.run(name),
        "torch": lambda: theirs.run(CASES[name].line),
    }
    said = {side: run()["tokens"] for side, run in sides.items()}
    same = np.mean(np.asarray(said["jax"]) == np.asarray(said["torch"]))
    if same < 0.98:  # in long answers, rounding decides where two words are equally likely
        sys.exit(f"{CASES[name].label}: the two sides do not say the same: {json.dumps(said)}")
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            seconds[side].append(run()["seconds"])
    figures = {side: {"median": statistics.median(s), "lowest": min(s), "highest": max(s)} for side, s in seconds.items()}
    return {"label": CASES[name].label, "same_tokens": float(same), "seconds": figures, "flops": counted(name)}


def counted(name: str) -> dict[str, float]:
    """FLOPs of the matrix products of both sides."""
    images, each = FRAMES if name == "video" else 1, QUESTIONS // PICTURES

    def question(**how: bool) -> dict[str, float]:
        return flops.totals(flops.question(MODEL, images, TEXT, **how), attention=True)

    ours, kept, published = question(), question(kept=True)["total"], question(published=True)
    liberties = ("vision encoder", "logits")  # see torch_model.py: the last block and all but the last logits are left out
    theirs = published["total"] + sum(ours[part] - published[part] for part in liberties)
    new = LONG if name == "decode" else NEW
    lengths = (TEXT + MODEL.tokens_per_image + n for n in range(1, new))
    further = sum(flops.totals(flops.token(MODEL, length), attention=True)["total"] for length in lengths)
    if name == "decode":
        return {"jax": further, "torch": further}
    if CASES[name].line.startswith("mixed"):
        once = (ours["total"] + (each - 1) * kept) * PICTURES
        return {"jax": once + QUESTIONS * further, "torch": QUESTIONS * (theirs + further)}
    return {"jax": kept if name == "again" else ours["total"], "torch": theirs}


def peaks(name: str, folder: Path, python: str) -> dict[str, int]:
    """Most memory of a process that does nothing else."""
    command = [sys.executable, __file__, "--peak", name, str(folder)]
    own = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    theirs = Theirs(python, "inference_speed_torch.py", folder)
    theirs.run(CASES[name].line)
    peak = theirs.run("peak")["bytes"]
    theirs.close()
    return {"jax": own, "torch": peak}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        f"| float32, {threads()} cores, seconds (lowest to highest) "
        "| lmm-jax | PyTorch | PyTorch / lmm-jax | by count | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for case in found.values():
        ours, theirs = case["seconds"]["jax"], case["seconds"]["torch"]
        times = [f"{s['median']:.3f} ({s['lowest']:.3f} to {s['highest']:.3f})" for s in (ours, theirs)]
        memory = " / ".join(f"{case['peak_bytes'][side] / 1e9:.2f}" for side in ("jax", "torch"))
        ratio = theirs["median"] / ours["median"]
        count = case["flops"]["torch"] / case["flops"]["jax"]
        lines.append(f"| {case['label']} | {times[0]} | {times[1]} | {ratio:.2f} | {count:.2f} | {memory} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
