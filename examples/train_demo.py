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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configs import demo  # noqa: E402
from lmm_jax.demo.dataset import write_dataset  # noqa: E402
from lmm_jax.demo.tokenizer import write_tokenizer  # noqa: E402

OUT = ROOT / demo.FOLDER
RUNS = ("demo_1_easy", "demo_2_world", "demo_3_align", "demo_4_token", "demo_5_clips", "demo_6_mini", "demo_7_finish")


def main() -> None:
    """Data, tokenizer, runs, answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little data, a few steps of each run")
    quick = parser.parse_args().quick
    share = 200 if quick else 1

    # 1. Conversations about pictures and clips: LLaVA JSON beside PNG and MP4 files.
    for world, settings in demo.WORLDS.items():
        number = {kind: min(settings[kind], settings[kind] // share + 11) for kind in ("images", "clips")}
        write_dataset(OUT / world, **settings | number)

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
