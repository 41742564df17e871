"""Draws the example picture and clip beside it: ``python examples/draw.py``."""

from pathlib import Path

from lmm_jax.demo import examples

FOLDER = Path(__file__).parent


def main() -> None:
    """Writes shapes.png and moving.mp4."""
    examples.picture().save(FOLDER / "shapes.png", optimize=True)
    (FOLDER / "moving.mp4").write_bytes(examples.clip())


if __name__ == "__main__":
    main()
