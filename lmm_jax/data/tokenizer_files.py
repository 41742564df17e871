"""Tokenizer files of a checkpoint -> a tokenizer as `transformers` makes it, without importing that where it is not needed.

`tokenizers` alone reads a `tokenizer.json` that `transformers` would take as it is: LLaMA-3.1's, the demo model's. Importing
`transformers` takes long, and longer where PyTorch is installed; the first answer should not wait for it.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from pathlib import Path
from typing import Any

_TOKENS = ("bos_token", "eos_token", "pad_token")
_KNOWN = {"tokenizer_class", "model_max_length", "model_input_names", "clean_up_tokenization_spaces", "chat_template"}
_OTHERS = ("added_tokens.json", "chat_template.jinja", "chat_template.json")


def read(folder: Path, settings: dict[str, Any]) -> Any:
    """A `transformers` tokenizer, or a `Plain` one; `settings` are those of tokenizer_config.json.

    Raises whatever the parsers raise for broken files.
    """
    if not (folder / "tokenizer.json").is_file():
        _check_sentencepiece(folder / "tokenizer.model")
    elif plain := _plain(folder, settings):
        return plain
    return _by_transformers(folder)


class Plain:
    """What `transformers` makes of a `tokenizer.json` that it takes as it is.

    Attributes:
      backend_tokenizer: of `tokenizers`.
      chat_template: the checkpoint's own, in Jinja's language.
      added_tokens_decoder: id -> token that is no part of the vocabulary proper.
      bos_token, bos_token_id, eos_token_id, pad_token_id: None where there is none.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Reads the folder's tokenizer.json."""
        import tokenizers

        self._folder, self.chat_template = folder, settings.get("chat_template")
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()
        self.named = {name: token for name in _TOKENS if (token := _content(settings.get(name))) is not None}
        self.bos_token = self.named.get("bos_token")
        ids = {name: self.backend_tokenizer.token_to_id(token) for name, token in self.named.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(ids.get, _TOKENS)

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        """The prompt's text. `transformers` makes it where the template asks for what is not offered here."""
        import jinja2

        assert not tokenize
        given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**given, **self.named)
        except (jinja2.TemplateSyntaxError, jinja2.UndefinedError):
            whole = _by_transformers(self._folder)
            return whole.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)

    @functools.cached_property
    def _template(self) -> Any:
        """Templates come from strangers: of Jinja's own functions they have `range` only, those of `transformers` besides."""
        import jinja2.ext
        import jinja2.sandbox

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals = {
            "range": jinja2.sandbox.safe_range,
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        return environment.from_string(self.chat_template)


def _plain(folder: Path, settings: dict[str, Any]) -> Plain | None:
    """None where the files ask for anything that tokenizer.json does not say by itself."""
    is_plain = settings.get("tokenizer_class") == "PreTrainedTokenizerFast"
    is_plain &= settings.keys() <= {*_KNOWN, *_TOKENS, "added_tokens_decoder"}
    is_plain &= isinstance(settings.get("chat_template"), str | None)
    if not is_plain or any((folder / name).exists() for name in _OTHERS):
        return None
    plain = Plain(folder, settings)
    file = folder / "special_tokens_map.json"
    named = {name: _content(token) for name, token in json.loads(file.read_text("utf-8")).items()} if file.is_file() else {}
    added = plain.added_tokens_decoder
    special = {token.content for token in added.values() if token.special}
    if not (named.items() <= plain.named.items() and set(plain.named.values()) <= special):
        return None
    for number, described in settings.get("added_tokens_decoder", {}).items():
        token = added.get(int(number))
        if any(getattr(token, name, None) != value for name, value in described.items()):
            return None
    return plain


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A token's text, as the files name tokens."""
    return token["content"] if isinstance(token, dict) else token


def _by_transformers(folder: Path) -> Any:
    """Imported without the notice that there is no PyTorch; the user's own setting wins."""
    name = "TRANSFORMERS_VERBOSITY"
    unset = name not in os.environ
    os.environ.setdefault(name, "error")
    try:
        from transformers import AutoTokenizer
    finally:
        if unset:
            del os.environ[name]
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _check_sentencepiece(file: Path) -> None:
    """Raise if this is no SentencePiece model; transformers would make an empty vocabulary of it, or ask for tiktoken."""
    import sentencepiece

    sentencepiece.SentencePieceProcessor(model_file=str(file))
