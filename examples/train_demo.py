"""From nothing to a model that answers: ``python examples/train_demo.py`` draws a small world and trains the demo model on it.

Seven runs, about six hours on two CPU cores; stopped at any point, the same command goes on. ``--quick`` takes a few minutes
and shows the whole way, with a model that has learnt little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from lmm_jax.demo.dataset import write_dataset
from lmm_jax.demo.tokenizer import write_tokenizer

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "demo"
RUNS = ("demo_1_easy", "demo_2_world", "demo_3_align", "demo_4_token", "demo_5_clips", "demo_6_mini", "demo_7_finish")


def main() -> None:
    """Data, tokenizer, runs, answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little data, a few steps of each run")
    quick = parser.parse_args().quick
    share = 200 if quick else 1

    # 1. Conversations about pictures and clips: LLaVA JSON beside PNG and MP4 files.
    write_dataset(OUT / "easy", images=16000 // share, clips=0, seed=100, objects=(1, 1))
    write_dataset(OUT / "world", images=60000 // share, clips=12000 // share, seed=200, turns=(4, 10))
    hard = {"relation": 3, "comparison": 2, "position": 2}  # learnt last, so asked more often
    write_dataset(OUT / "binding", images=60000 // share, clips=0, seed=400, turns=(4, 10), times=hard)
    write_dataset(OUT / "clips", images=0, clips=30000 // share, seed=500, turns=(4, 10))
    write_dataset(OUT / "held_out", images=600 // share + 8, clips=150 // share + 8, seed=300)

    # 2. A tokenizer of the words that occur in them.
    write_tokenizer(OUT / "tokenizer")

    # 3. Encoder and decoder from nothing (easy scenes, then all), stage 1, stage 2 in four parts. Each starts from the last.
    for run in RUNS:
        steps = ["--max-steps", "4", "--data.batch-size", "8"] if quick else []
        command([sys.executable, "-m", "train", f"configs/{run}.py", *steps])

    # 4. Questions.
    model = OUT / "7_finish" / "model"
    ask = [sys.executable, "-m", "lmm_jax", "ask", "--model", str(model), "--max-new-tokens", "16"]
    command([*ask, "--image", "examples/shapes.png", "What colour is the circle?"])
    command([*ask, "--video", "examples/moving.mp4", "Where does the circle go?"])

    # 5. All tensors in bfloat16, as the package has them.
    convert, shipped = [sys.executable, "-m", "conversion"], str(OUT / "model")
    with tempfile.TemporaryDirectory() as published:
        command([*convert, "to-hf", str(model), published])
        command([*convert, "from-hf", published, shipped, "--dtype", "bfloat16", "--overwrite"])
    print(f"\nHow good it is: python benchmarks/demo_accuracy.py --model {shipped}")


def command(words: list[str]) -> None:
    """Runs a command from the root of the repository, showing it."""
    print("\n$ " + " ".join(words[1:] if words[0] == sys.executable else words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
