"""The other side of benchmarks/inference_speed.py: the model of torch_model.py answers questions, one by one.

For each line on stdin does what is named there and prints {"seconds": …, "tokens": […]}:

    ask PICTURE QUESTION NEW      from uint8 pixels to so many tokens
    video QUESTION NEW            the same of a video, whose frames go through as one batch
    decode QUESTION NEW           as ask, of picture 0, but the seconds are those after the first token
    mixed NEW                     all questions, each about its picture
    peak                          {"bytes": most memory so far}
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import peak_bytes
from torch import Tensor
from torch_model import IGNORE, LlavaMini, answer_lines, load_weights
from transformers import DynamicCache


class Twin:
    """The model and what it is asked, from what the driver wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        """Loads all of it."""
        self.model = LlavaMini(json.loads((folder / "config.json").read_text())).eval()
        load_weights(self.model, folder / "weights.npz")
        with np.load(folder / "inputs.npz") as inputs:
            self.pictures, self.video = torch.from_numpy(inputs["pictures"]), torch.from_numpy(inputs["video"])
            self.questions = torch.from_numpy(inputs["questions"])

    @torch.inference_mode()
    def ask(self, pixels: Tensor, ids: Tensor, new: int) -> tuple[list[int], float]:
        """pixels (n,H,W,3) uint8, ids (L,) -> tokens, when the first one was there."""
        ids = ids[None]
        text = self.model.embed_tokens(ids.clamp(min=0))
        x, _ = self.model.place(text, ids, torch.full_like(ids, IGNORE), pixels[None])
        cache, tokens, first = DynamicCache(), [], 0.0
        for _ in range(new):
            hidden = super(LlavaMini, self.model).forward(inputs_embeds=x, past_key_values=cache, use_cache=True)
            token = self.model.lm_head(hidden.last_hidden_state[:, -1]).argmax(-1)
            tokens.append(int(token))
            first = first or time.perf_counter()
            x = F.embedding(token[None], self.model.embed_tokens.weight)
        return tokens, first

    def run(self, what: str, *numbers: int) -> dict[str, Any]:
        """What a line asks for."""
        if what == "peak":
            return {"bytes": peak_bytes()}
        start, *rest, new = time.perf_counter(), *numbers
        if what == "mixed":
            each = len(self.questions) // len(self.pictures)
            tokens = [self.ask(self.pictures[q // each][None], ids, new)[0] for q, ids in enumerate(self.questions)]
        elif what == "video":
            tokens, _ = self.ask(self.video, self.questions[rest[0]], new)
        else:
            picture, question = (0, *rest) if what == "decode" else rest
            tokens, first = self.ask(self.pictures[picture][None], self.questions[question], new)
            start = first if what == "decode" else start
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def start(folder: Path) -> Callable[[list[str]], dict[str, Any]]:
    """The model is loaded at once."""
    twin = Twin(folder)
    return lambda words: twin.run(words[0], *map(int, words[1:]))


if __name__ == "__main__":
    answer_lines(__doc__, start)
