"""What judges are told, and the long instructions before some questions: our own words, or published ones from a file.

The published texts come with each benchmark and are not shipped (evaluation spec appendix B). A file of them has the form of
`wording.json`, which holds ours:

    {"name": "as published", SECTION: {PART: TEXT, ...}, ...}

SECTION and PART are those of `SECTIONS`; a text is a string, or a list of lines. Each {placeholder} named there stands in the
text; other braces mean themselves. A section may be left out, but then the benchmarks that need it are refused: texts of
different origins are never mixed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import read_json

_PAIR = {"system": (), "user": ("question", "answer", "pred")}

# section -> part -> the placeholders that its text must have
SECTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "videochatgpt_correctness": _PAIR,
    "videochatgpt_detail": _PAIR,
    "videochatgpt_context": _PAIR,
    "videochatgpt_temporal": _PAIR,
    "videochatgpt_consistency": {"system": (), "user": ("question1", "question2", "answer", "pred1", "pred2")},
    "video_qa": _PAIR,
    "llava_bench": {
        "system": (),
        "user": ("context", "question", "reference", "candidate", "rule"),
        "rule_conv": (),
        "rule_detail": (),
        "rule_complex": (),
    },
    "mm_vet": {"examples": ()},  # lines "question | right answer | prediction | correctness"; a line without the last follows
    "msvd_msrvtt": {"instruction": ("question",)},
    "activitynet_qa": {"instruction": ("question",)},
    "egoschema": {"instruction": ("question", "options")},
}

_PLACEHOLDER = re.compile(r"\{([a-z]+[12]?)\}")


@dataclasses.dataclass(frozen=True)
class Wording:
    """A set of texts.

    Attributes:
      name: as its file says.
      digest: of the texts, 16 hexadecimal digits; figures are comparable only where it is the same.
      texts: section -> part -> text.
    """

    name: str
    digest: str
    texts: Mapping[str, Mapping[str, str]]

    def text(self, section: str, part: str, **values: str) -> str:
        """A text with its placeholders filled; what is filled in is not looked at again.

        Raises:
          UserError: this wording has no such section.
        """
        if section not in self.texts:
            raise UserError(
                f"the wording {self.name!r} has no {section!r}: add it to its file, or use the wording that is shipped"
            )
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), self.texts[section][part])

    def messages(self, section: str, **values: str) -> list[dict[str, str]]:
        """The system and user messages to a judge.

        Raises:
          UserError: this wording has no such section.
        """
        return [
            {"role": "system", "content": self.text(section, "system")},
            {"role": "user", "content": self.text(section, "user", **values)},
        ]


@functools.cache
def own() -> Wording:
    """The wording that is shipped."""
    with resources.as_file(resources.files("lmm_jax.evaluation") / "wording.json") as file:
        return load(file)


def load(file: Path) -> Wording:
    """A wording from a JSON file.

    Raises:
      UserError: the file is missing or not JSON; a key is unknown or missing, or a placeholder is; a value is no text.
    """
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise UserError(f'{file} is no wording: expected a JSON object with a "name" and sections {", ".join(SECTIONS)}')
    given = {key: value for key, value in found.items() if key != "name"}
    _check_keys(str(file), given, SECTIONS, required=False)
    texts = {section: _section(file, section, parts) for section, parts in given.items()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
    return Wording(found["name"], digest, texts)


def _section(file: Path, section: str, parts: Any) -> dict[str, str]:
    where = f"{section} in {file}"
    _check_keys(where, parts, SECTIONS[section], required=True)
    texts = {part: _text(f"{part} of {where}", text) for part, text in parts.items()}
    for part, text in texts.items():
        placeholders = SECTIONS[section][part]
        lacking = [name for name in placeholders if f"{{{name}}}" not in text]
        if lacking:
            raise UserError(
                f"{part} of {where} lacks {', '.join(f'{{{name}}}' for name in lacking)}: what is asked goes there"
            )
    return texts


def _text(what: str, text: Any) -> str:
    lines = text if isinstance(text, list) else [text]
    if not lines or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{what} is {text!r:.60}: expected a text, or a list of lines")
    return "\n".join(lines)


def _check_keys(where: str, given: Any, known: Mapping[str, Any], required: bool) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where} holds {given!r:.60}: expected {', '.join(known)}")
    unknown = sorted(set(given) - set(known))
    missing = sorted(set(known) - set(given)) if required else []
    if unknown or missing:
        faults = [f"has unknown keys {', '.join(unknown)}"] * bool(unknown) + [f"lacks {', '.join(missing)}"] * bool(missing)
        raise UserError(f"{where} {' and '.join(faults)}: expected {', '.join(known)}")
