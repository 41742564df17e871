"""A folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from lmm_jax.errors import UserError

_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model"]
_SAFE_WEIGHTS = ["*.safetensors", "non_lora_trainables.bin"]
_TORCH_WEIGHTS = ["pytorch_model*.bin", "adapter_model.bin"]


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form ``owner/name``."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    return re.fullmatch(f"{part}/{part}", text) is not None


def resolve(source: str, weights: bool = True) -> Path:
    """The folder `source`, or a local copy of the hub repository it names (downloaded with a progress bar).

    Args:
      source: a path, or ``owner/name`` where no such path exists.
      weights: False fetches the small files (configuration, tokenizer) only.

    Raises:
      UserError: neither a folder nor a name, or the download failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source} is a file: give the folder that holds the checkpoint")
    if not is_hub_name(source):
        raise UserError(f"there is no folder {source}, and it is no hub name (owner/name) either")
    folder = _download(source, _DESCRIPTION + (_SAFE_WEIGHTS if weights else []))
    if weights and not list(folder.glob("*.safetensors")):
        folder = _download(source, _TORCH_WEIGHTS)
    return folder


def _download(name: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the network stack below the hub client has exceptions of its own in every version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"there is no folder {name}, and downloading it from the Hugging Face hub failed: {reason}; "
            "check the name and the network, or download it by hand and give the folder"
        ) from error
