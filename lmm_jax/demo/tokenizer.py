"""The tokenizer of the small visual world: byte-level, nearly every word of the world a token of its own.

It has the special tokens and a chat template of LLaMA-3.1's kind, without system turn. With so few words no merges have to
be learned: whole words are looked up (as LLaMA-3.1's tokenizer does before it merges), everything else falls into bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmm_jax.demo import clip_questions, questions
from lmm_jax.demo.asking import ask_each
from lmm_jax.demo.captions import describe, describe_clip
from lmm_jax.demo.clip_questions import ClipView
from lmm_jax.demo.clips import make_clip
from lmm_jax.demo.options import SceneView
from lmm_jax.demo.world import make_scene
from lmm_jax.errors import UserError

VOCABULARY = 512  # most tokens
BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
# The first id must never be read: pre-fusion leaves out ids of 0 and less.
SPECIAL = (
    "<|reserved_special_token_0|>",
    BOS,
    "<|end_of_text|>",
    PAD,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    EOS,
)
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages if message.role != 'system' %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # LLaMA-3's, digits single
_MAX_LENGTH = 4096


def write_tokenizer(folder: str | os.PathLike, *, seed: int = 0, scenes: int = 2000) -> None:
    """Counts the words of generated texts and writes a tokenizer with the most frequent ones to `folder`.

    Args:
      folder: where to; made if need be.
      seed: of the scenes.
      scenes: how many pictures, and half as many clips, are talked about.

    Raises:
      UserError: the folder cannot be made.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"a tokenizer cannot be written to {folder} ({error}): choose another folder") from error
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    numbers = Counter(word for text in _texts(seed, scenes) for word, _ in pre_tokenizer.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [w for w, _ in sorted(numbers.items(), key=lambda item: (-item[1], item[0])) if len(w) > 1]
    entries = [*SPECIAL, *alphabet, *words][:VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(entries)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])

    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **named,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", named)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _texts(seed: int, scenes: int) -> Iterator[str]:
    """What is said about generated scenes, and the words of the chat template."""
    yield from ("user", "assistant", "\n\n", "\n") * scenes
    for i in range(scenes):
        rng = np.random.default_rng((seed, i))
        scene = make_scene(rng)
        yield from describe(scene, rng)
        asked = ask_each(SceneView(scene), questions.FORMS, rng)
        if i % 2:
            clip = make_clip(rng)
            yield from describe_clip(clip, rng)
            asked += ask_each(ClipView(clip), clip_questions.FORMS, rng)
        for question in asked:
            yield from (question.text, question.answer)
