"""Draws the example picture and clip beside it: ``python examples/draw.py``."""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
SIZE = (448, 336)
SCALE = 4  # drawn larger and scaled down, so that edges are smooth


def draw(circle_x: float) -> Image.Image:
    """A red circle at `circle_x` pixels from the left, a blue square and a green triangle."""
    image = Image.new("RGB", [SCALE * s for s in SIZE], (244, 241, 232))
    pen = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        return [SCALE * p for p in points]

    pen.rectangle(at(250, 150, 390, 290), fill=(44, 93, 190))
    pen.polygon(at(120, 180, 200, 300, 40, 300), fill=(58, 145, 82))
    pen.ellipse(at(circle_x - 40, 40, circle_x + 40, 120), fill=(205, 50, 45))
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def main() -> None:
    """Writes shapes.png, and moving.mp4: the circle crosses the picture in 6 seconds."""
    draw(300).save(FOLDER / "shapes.png", optimize=True)
    with av.open(str(FOLDER / "moving.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.asarray(draw(60 + 5.5 * i)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
