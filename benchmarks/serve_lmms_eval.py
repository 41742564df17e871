"""lmms-eval's OpenAI model against `lmm serve`: ``python benchmarks/serve_lmms_eval.py --url http://localhost:8000/v1``.

Runs where lmms-eval is installed (``pip install lmms-eval``, which brings PyTorch; an environment of its own is best). Its
model class sends questions about the example picture and clip to a server of the demo model, many at once, and the answers
must be the given ones. Prints them.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.openai import OpenAICompatible
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
ASKED = (
    ("shapes.png", "What colour is the circle?", "red"),
    ("shapes.png", "What colour is the square?", "blue"),
    ("shapes.png", "What shape is green?", "triangle"),
    ("moving.mp4", "Which way does the circle move?", "right"),
)


def main() -> int:
    """Asks, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--repeat", type=int, default=8, help="times that each question is asked (8)")
    args = parser.parse_args()
    model = OpenAICompatible(
        model_version="demo", base_url=args.url, api_key="none", timeout=60, max_retries=1, pass_video_url=True
    )
    documents = [of for of in ASKED for _ in range(args.repeat)]
    model.task_dict = {"demo": {"test": documents}}
    requests = [
        Instance(
            "generate_until",
            ("", messages, {"max_new_tokens": 16, "temperature": 0}, number, "demo", "test"),
            number,
            {"task": "demo", "doc_id": number, "repeats": 1},
        )
        for number in range(len(documents))
    ]
    answers = [result.text for result in model.generate_until(requests)]
    for (_, question, _), answer in list(zip(documents, answers))[:: args.repeat]:
        print(f"{question} {answer}")
    wrong = sum(answer != right for answer, (_, _, right) in zip(answers, documents))
    print(f"{len(answers)} answers, {wrong} not as expected")
    return int(wrong > 0)


def messages(document: tuple[str, str, str]) -> list[dict]:
    """A document as lmms-eval's messages."""
    name, question, _ = document
    if name.endswith(".png"):
        shown = {"type": "image", "url": Image.open(EXAMPLES / name).convert("RGB")}
    else:
        content = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
        shown = {"type": "video", "url": f"data:video/mp4;base64,{content}"}
    return [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]


if __name__ == "__main__":
    sys.exit(main())
