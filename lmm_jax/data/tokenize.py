"""Text <-> token ids: the checkpoint's own tokenizer, prompt spans -> ids and labels, and streaming back (spec section 8).

`tokenizer_files` reads the files.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmm_jax import storage
from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID
from lmm_jax.data import tokenizer_files
from lmm_jax.data.conversation import IMAGE, Span
from lmm_jax.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip
_LLAMA_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_SPACE = "▁"  # SentencePiece's visible space


class Tokenizer:
    """A LLaMA tokenizer: byte-level BPE (LLaMA-3.1, `tokenizer.json`) or SentencePiece (Vicuna, `tokenizer.model`)."""

    def __init__(self, hf: Any, folder: Path, legacy: bool) -> None:
        """Wrap what `tokenizer_files.read` gives; use `load` instead. For `legacy` see `_pin_spaces`.

        Raises:
          UserError: it is of neither kind.
        """
        self.folder = folder
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        decoder = str(self._backend.decoder)
        self.is_sentencepiece = "ByteFallback" in decoder
        if not self.is_sentencepiece and "ByteLevel" not in decoder:
            raise UserError(f"the tokenizer in {folder} is neither byte-level BPE nor SentencePiece, as those of LLaMA are")
        if self.is_sentencepiece:
            _pin_spaces(self._backend, legacy)
        self._prefix = " " if self.is_sentencepiece and not legacy else ""
        special = {i: token.content for i, token in hf.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(special)
        self._special = re.compile(f"(?={'|'.join(map(re.escape, special.values())) or '(?!)'})")
        self._added = {i: token.content for i, token in hf.added_tokens_decoder.items()}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model folder; the network is never used.

        Raises:
          UserError: the folder has no tokenizer, or one that cannot be read.
        """
        try:
            folder = storage.local_folder(folder, TOKENIZER_FILES)
        except OSError as error:
            raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(
                f"there is no tokenizer in {folder}: copy tokenizer.json (LLaMA-3.1) or tokenizer.model (Vicuna), "
                "tokenizer_config.json and special_tokens_map.json there from the checkpoint"
            )
        file = folder / "tokenizer_config.json"
        try:
            settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            hf = tokenizer_files.read(folder, settings)
        except Exception as error:  # whatever a broken file makes the parsers raise
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({cause}): copy its files again from the checkpoint"
            ) from error
        return cls(hf, folder, settings.get("legacy") is not False)

    @property
    def bos_token(self) -> str | None:
        """The token that starts a prompt, as text."""
        return self._hf.bos_token

    @property
    def bos_token_id(self) -> int | None:
        """The id that starts a prompt."""
        return self._hf.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends an answer, by the tokenizer's files; see `stop_token_ids`."""
        return self._hf.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The padding id, by the tokenizer's files."""
        return self._hf.pad_token_id

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The checkpoint's own chat template, if it has one."""
        return self._hf.chat_template

    def token_id(self, token: str) -> int | None:
        """The id of one token of the vocabulary."""
        return self._backend.token_to_id(token)

    def apply_chat_template(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The prompt text of the checkpoint's own chat template.

        Raises:
          UserError: the template refuses these turns.
        """
        import jinja2

        try:
            return self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template of the tokenizer in {self.folder} refuses the conversation: {error}"
            ) from error

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added; special tokens spelled out in it are recognised."""
        return [i for i, _ in self._tokenize(text)]

    def _tokenize(self, text: str) -> list[tuple[int, int]]:
        """(token id, index of the first character it stands for) for each token of a text."""
        prefix = self._prefix if text and not self._special.match(text) else ""
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError("the text is not valid UTF-8: write it in UTF-8")
        encoding = self._backend.encode(prefix + text, add_special_tokens=False)
        return [(i, max(first - len(prefix), 0)) for i, (first, _) in zip(encoding.ids, encoding.offsets)]

    def encode(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and training labels of a prompt (spec section 8).

        The spans are tokenised as one text, cut at image placeholders, with `IMAGE_TOKEN_ID` between the pieces. A BOS is
        put in front unless the template has written it.

        A label is set where the first character of a token lies in an answer. Character offsets decide, and not lengths
        of separately tokenised prefixes, as in the published code: SentencePiece puts a space in front of whatever it is
        given, so that a prefix alone has other tokens than the same prefix in its text.

        Returns:
          ids: int32 (T,).
          labels: int32 (T,), the id where it belongs to an answer or its end token, else `IGNORE_LABEL`.
        """
        text = "".join(span.text for span in spans)
        is_answer = np.array([span.is_answer for span in spans for _ in span.text] + [False])
        ids, character, position = (
            [],
            [],
            0,
        )  # character: index of a token's first one; -1, which is no answer, where it has none
        for start, stop, between in [*self._cuts(spans), (len(text), len(text), [])]:
            piece = self._tokenize(text[position:start])
            ids += [i for i, _ in piece] + between
            character += [position + first for _, first in piece] + [-1] * len(between)
            position = stop
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids, character = [self.bos_token_id, *ids], [-1, *character]
        ids = np.array(ids, np.int32)
        return ids, np.where(is_answer[character], ids, np.int32(IGNORE_LABEL))

    def _cuts(self, spans: Sequence[Span]) -> Iterator[tuple[int, int, list[int]]]:
        """Where the prompt is cut: (start, stop, ids that take the place of these characters), in order."""
        offset = 0
        for span in spans:
            for part in re.split(f"({IMAGE})", span.text) if span.has_placeholders else [span.text]:
                if part == IMAGE and span.has_placeholders:
                    yield offset, offset + len(part), [IMAGE_TOKEN_ID]
                elif span.is_literal:
                    for match in self._special.finditer(part):  # cut after its first character, it is no longer recognised
                        yield offset + match.start() + 1, offset + match.start() + 1, []
                offset += len(part)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens, placeholders and ids outside the vocabulary are skipped.

        Spaces before punctuation stay as the model wrote them: the clean-up that some tokenizer files ask for is made for
        other kinds of tokenizer and destroys text. Bytes that are not UTF-8 become one replacement character for each
        faulty sequence, the characters around them stay.
        """
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """What one token prints, in UTF-8; a character may be spread over several tokens. Empty where `decode` skips it."""
        token_id = int(token_id)
        if token_id < 0 or token_id in self._special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self.is_sentencepiece:
            return bytes(map(_byte_of_character().__getitem__, token))
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()


class StreamDecoder:
    """Turns token ids into text one at a time.

    All texts together, `flush` included, are what `Tokenizer.decode` gives for all ids; each token costs the same however
    long the answer is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start a new answer."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.is_sentencepiece  # the space that SentencePiece puts before the first word is not text

    def push(self, token_id: int) -> str:
        """The text that this token completes; bytes of an incomplete character are held back."""
        return self._strip(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end of the answer: a replacement character if it stops inside a character."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def stop_token_ids(tokenizer: Tokenizer, template: str, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
    """Ids that end an answer: the checkpoint's own, and for LLaMA-3.1 templates its end tokens (spec section 8)."""
    ids = set(eos_token_ids)
    if template.startswith("llava_llama_3_1"):
        ids |= {i for i in map(tokenizer.token_id, _LLAMA_STOPS) if i is not None}
    return tuple(sorted(ids))


def _pin_spaces(backend: Any, legacy: bool) -> None:
    """Put the spaces that SentencePiece adds where the published code's tokenizer (transformers 4) puts them.

    That is, with `legacy` (or no such setting in the checkpoint): in front of every text and after every special token;
    without: in front of the text only, which `Tokenizer._tokenize` does. transformers 5 takes a missing setting for false
    and adds none where there is a space already, so that the piece after "<image> " would have other tokens.
    """
    from tokenizers import normalizers

    visible = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible] if legacy else [visible])
    backend.pre_tokenizer = None


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others, in order, as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
