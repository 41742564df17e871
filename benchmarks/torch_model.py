"""LLaVA-Mini in plain PyTorch, for comparisons of speed: transformers' CLIP and LLaMA layers with their SDPA attention.

It is written as one writes this in PyTorch: `torch.nn.MultiheadAttention` as compressor, whole batches, pre-fusion as in the
published code, which sends [features | compressed tokens | text] through LLaMA's layers with answers and padding masked. It
takes the liberties that cost one line: CLIP's last block, whose output nobody reads, is left out, only positions with a label
meet the vocabulary, and what is frozen has no graph.

Axis letters: B rows, n images of a row, N = B·n, L tokens of a row, V vision tokens per image, G patch grid side, S = G²+V+L,
T = L−1+n·V decoder positions, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

IMAGE, IGNORE = -200, -100
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = "model.vision_tower.vision_tower.vision_model."

Batch = dict[str, Tensor]


class Compressor(nn.Module):
    """Learned queries that read an image's features (spec section 2)."""

    def __init__(self, size: int, heads: int, width: int) -> None:
        """C, heads, Dv."""
        super().__init__()
        self.size = size
        self.query = nn.Parameter(torch.empty(size**2, width))
        self.pos_embed = nn.Parameter(torch.empty(size**2, width), requires_grad=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N,G²,Dv) -> (N,C²,Dv)."""
        grid, table = round(x.shape[1] ** 0.5), self.pos_embed.view(1, self.size, self.size, -1).permute(0, 3, 1, 2)
        position = F.interpolate(table, (grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
        q, v = self.ln_q(self.query) + self.pos_embed, self.ln_kv(x)
        return self.attn(q.expand(len(x), -1, -1), v + position, v, need_weights=False)[0]


class LlavaMini(LlamaModel):
    """LLaVA-Mini, or LLaVA-v1.5 where there is no compressor; the loss of a batch."""

    def __init__(self, c: dict[str, Any]) -> None:
        """`c` is the content of a model folder's config.json."""
        super().__init__(_llama(c["decoder"]))
        v, width = c["vision"], self.config.hidden_size
        self.vision_tower = CLIPVisionModel(_clip(v))
        self.vision_tower.post_layernorm = nn.Identity()
        self.mm_projector = nn.Sequential(nn.Linear(v["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
        if c["compressor"]:
            self.compressor = Compressor(c["compressor"]["size"], c["compressor"]["num_heads"], v["hidden_size"])
            self.prefusion_layers = nn.ModuleList(LlamaDecoderLayer(self.config, i) for i in range(c["prefusion_layers"]))
        self.fuses = bool(c["compressor"])
        if not c["decoder"]["tie_word_embeddings"]:
            self.lm_head = nn.Linear(width, c["decoder"]["vocab_size"], bias=False)
        self.vision_tower.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
        """Mean cross-entropy: ids and labels (B,L), one placeholder a row, 0 where padded; pixels (B,n,H,W,3) uint8."""
        with torch.set_grad_enabled(not self.fuses):
            text = self.embed_tokens(ids.clamp(min=0))
        x, labels = self.place(text, ids, labels, pixels)
        hidden = super().forward(inputs_embeds=x, use_cache=False).last_hidden_state
        labelled = labels[:, 1:] != IGNORE
        logits = F.linear(hidden[:, :-1][labelled], self.embed_tokens.weight)
        return F.cross_entropy(logits, labels[:, 1:][labelled])

    def place(self, text: Tensor, ids: Tensor, labels: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text (B,L,D) and what is to be seen -> decoder input (B,T,D), labels (B,T)."""
        x = self.mm_projector(features := self.see(pixels.flatten(0, 1)))
        if self.fuses:
            x, text = self.fuse(torch.cat([x, self.mm_projector(self.compressor(features))], 1), text, ids, labels)
        return splice(text, x.reshape(len(ids), -1, x.shape[-1]), ids, labels)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """(N,H,W,3) uint8 -> CLIP's features (N,G²,Dv)."""
        x = (pixels / 255 - self.mean) / self.std
        return self.vision_tower(x.permute(0, 3, 1, 2)).last_hidden_state[:, 1:]

    def fuse(self, image: Tensor, text: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-fusion (spec section 4): image (N,G²+V,D), text (B,L,D) -> vision tokens (N,V,D), fused text (B,L,D)."""
        n, length = len(image) // len(text), image.shape[1]
        seen = (ids > 0) & (labels == IGNORE)
        visible = F.pad(seen, (length, 0), value=True)  # (B,S)
        causal = torch.ones(visible.shape[1], visible.shape[1], dtype=torch.bool).tril()
        mask = torch.zeros(len(text), 1, *causal.shape).masked_fill_(~(causal & visible[:, None, None]), -torch.inf)
        rope = self.rotary_emb(text, visible.cumsum(1) - 1)
        mask, *rope = (t.repeat_interleave(n, 0) for t in (mask, *rope)) if n > 1 else (mask, *rope)
        x = torch.cat([image, text.repeat_interleave(n, 0)], 1)
        for layer in self.prefusion_layers:
            x = layer(x, attention_mask=mask, position_embeddings=tuple(rope))
        tokens, fused = x[:, length - self.compressor.size**2 : length], x[:, length:]
        fused = fused.unflatten(0, (-1, n)).mean(1)
        return tokens, torch.where(seen[..., None], fused, text)


def splice(text: Tensor, tokens: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's tokens (B,n·V,D) in the place of its placeholder: text (B,L,D) -> decoder input (B,T,D), labels (B,T)."""
    length, count = ids.shape[1], tokens.shape[1]
    after = torch.arange(length - 1 + count) - (ids == IMAGE).int().argmax(1, keepdim=True)  # (B,T), 0 at the first token
    inside = (after >= 0) & (after < count)
    source = torch.arange(length - 1 + count) - (after >= count) * (count - 1)  # in the text
    x = torch.cat([text, tokens], 1)
    at = torch.where(inside, length + after, source)
    x = x[torch.arange(len(x))[:, None], at]
    return x, torch.where(inside, IGNORE, labels.gather(1, source.clamp(max=length - 1)))


def _llama(d: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=d["vocab_size"],
        hidden_size=d["hidden_size"],
        intermediate_size=d["intermediate_size"],
        num_hidden_layers=d["num_layers"],
        num_attention_heads=d["num_heads"],
        num_key_value_heads=d["num_kv_heads"],
        head_dim=d["head_dim"],
        rms_norm_eps=d["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": d["rope_theta"]},
        max_position_embeddings=d["max_position_embeddings"],
        attn_implementation="sdpa",
    )


def _clip(v: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=v["hidden_size"],
        intermediate_size=v["intermediate_size"],
        num_hidden_layers=v["num_layers"] - 1,
        num_attention_heads=v["num_heads"],
        patch_size=v["patch_size"],
        image_size=v["image_size"],
        layer_norm_eps=v["layer_norm_eps"],
        hidden_act="quick_gelu",
        attn_implementation="sdpa",
    )


def load_weights(model: LlavaMini, file: Path) -> None:
    """From an NPZ file of arrays under Hugging Face's names, one after the other, so that few lie in memory twice."""
    missing = model.state_dict()
    with np.load(file) as weights, torch.no_grad():
        for name, array in weights.items():
            missing.pop(name.replace(VISION, "model.vision_tower.").removeprefix("model.")).copy_(torch.from_numpy(array))
    if missing:
        sys.exit(f"{file} lacks {', '.join(missing)}")


def answer_lines(doc: str, start: Callable[[Path], Callable[[list[str]], dict[str, Any]]]) -> None:
    """Answers a driver on stdin line by line, with one line of JSON each; the first line on stdout tells the versions.

    Args:
      doc: of the script, which is given a folder and --threads.
      start: folder -> what answers the words of a line.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by the driver")
    parser.add_argument("--threads", type=int, required=True, help="that work on one operation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    answer = start(args.folder)
    for line in sys.stdin:
        print(json.dumps(answer(line.split())), flush=True)
