"""Tokenizer files: which travel with a model, and the little of them that a model's configuration depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from conversion.readers import read_json
from lmm_jax.errors import UserError

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
GENERATION = "generation_config.json"
LLAMA_3_PADDING = "<|finetune_right_pad_id|>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What a folder says about its tokenizer, without loading it.

    Attributes:
      folder: where its files are, None when there are none.
      special: the added tokens and their ids.
      chat_template: whether the tokenizer has a template of its own.
      pad_token: the padding token it names, if any.
    """

    folder: Path | None = None
    special: dict[str, int] = dataclasses.field(default_factory=dict)
    chat_template: bool = False
    pad_token: str | None = None

    @property
    def is_llama_3(self) -> bool:
        """Whether prompts follow LLaMA-3's chat template (spec section 8)."""
        return self.chat_template and "<|eot_id|>" in self.special

    @property
    def padding_id(self) -> int | None:
        """The id of the padding token it names, or of the one LLaMA-3.1 reserves for it."""
        return next((self.special[t] for t in (self.pad_token, LLAMA_3_PADDING) if t in self.special), None)


def read_tokenizer(folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer of the first folder that has one (``tokenizer.json`` or ``tokenizer.model``).

    Raises:
      UserError: one of its JSON files is broken.
    """
    folder = next((f for f in folders if any((f / name).is_file() for name in VOCABULARIES)), None)
    if folder is None:
        return Tokenizer()
    config, vocabulary, added = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    )
    try:
        special = {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
        special |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"the added tokens in {folder} cannot be understood ({error!r}): its tokenizer is broken") from error
    pad_token = config.get("pad_token")
    return Tokenizer(
        folder,
        special | added,
        "chat_template" in config or (folder / "chat_template.jinja").is_file(),
        pad_token.get("content") if isinstance(pad_token, dict) else pad_token,
    )


def files_to_copy(tokenizer: Tokenizer, folders: Sequence[Path]) -> list[Path]:
    """The tokenizer's files, and the first ``generation_config.json`` in `folders`."""
    found = [tokenizer.folder / name for name in FILES if (tokenizer.folder / name).is_file()] if tokenizer.folder else []
    generation = [f / GENERATION for f in folders if (f / GENERATION).is_file()]
    return found + generation[:1]
