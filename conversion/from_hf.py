"""Hugging Face checkpoint -> model folder, and the composition of a text-only LLaMA with a CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from conversion import lora
from conversion.hf_config import Json, model_from_hf, text_model_from_hf
from conversion.hub import resolve
from conversion.matching import ignore_patterns, match
from conversion.names import EMBEDDING, VISION_PREFIX, table
from conversion.progress import byte_bar
from conversion.readers import Tensors, open_tensors, read_json, shorten
from conversion.tokenizers import GENERATION, VOCABULARIES, Tokenizer, files_to_copy, read_tokenizer
from conversion.vision import encoder, named_encoder
from lmm_jax.checkpoint import LazyLeaf, write_model
from lmm_jax.checkpoint_io import num_bytes
from lmm_jax.config import FORMAT, ModelConfig
from lmm_jax.errors import UserError

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

_PROJECTOR = "model.mm_projector."


@dataclasses.dataclass(frozen=True)
class Options:
    """What both ways into a model folder share.

    Attributes:
      tokenizer: folder to take the tokenizer from instead of the checkpoint.
      template: prompt template instead of the one that the tokenizer tells.
      ignore: regular expressions of tensor names to leave out, besides `matching.IGNORED`.
      overwrite: replace an existing model folder.
      dtype: "bfloat16" or "float32" for all tensors, rounded to the nearest; otherwise each keeps its own.
      report: receives each line that tells what was done.
    """

    tokenizer: str | None = None
    template: str | None = None
    ignore: Sequence[str] = ()
    overwrite: bool = False
    dtype: str | None = None
    report: Callable[[str], object] = print


class Opened(NamedTuple):
    """A checkpoint whose tensors all fit; none is read yet.

    Attributes:
      config: of the model.
      leaves: by their names in a model folder.
      tokenizer: as found, or as asked for.
      folders: that may hold its other files, the most specific first.
    """

    config: ModelConfig
    leaves: dict[str, LazyLeaf]
    tokenizer: Tokenizer
    folders: list[Path]


def open_checkpoint(src: str, options: Options, *, base: str | None = None, vision: str | None = None) -> Opened:
    """What `from_hf` would write; arguments and errors are its own."""
    patterns = ignore_patterns(options.ignore)
    folder = resolve(src)
    tensors, folders = _open(folder, base)
    hf_folder = next((f for f in folders if (f / "config.json").is_file()), folder)
    hf = read_json(hf_folder / "config.json")
    inside = any(name.startswith(VISION_PREFIX) and not any(p.search(name) for p in patterns) for name in tensors.leaves)
    if vision is None:
        vision_config, separate = named_encoder(hf.get("mm_vision_tower"), hf_folder, not inside)
    else:
        vision_config, separate = encoder(vision, not inside)
    options.report(
        "vision encoder: " + ("weights inside the checkpoint" if inside else f"{len(separate.leaves)} tensors of its own")
    )
    tokenizer = _tokenizer(folders, options)
    config = model_from_hf(hf, _generation(folders), vision_config, tokenizer, str(hf_folder / "config.json"))
    config = dataclasses.replace(config, template=options.template or config.template)
    leaves, ignored = match(table(config), _together(tensors, separate), patterns, src)
    _report_ignored(ignored, options)
    return Opened(config, leaves, tokenizer, folders)


def from_hf(src: str, dst: str, options: Options, *, base: str | None = None, vision: str | None = None) -> None:
    """Converts a LLaVA-Mini or LLaVA-v1.5 checkpoint, whole or LoRA (spec section 9). Writes all of `dst` or nothing.

    Args:
      src: folder or hub name.
      dst: the model folder to write.
      options: see `Options`.
      base: folder or hub name of the base that a LoRA adapter is merged on, instead of the one the adapter names.
      vision: folder or hub name of the vision encoder, instead of ``mm_vision_tower``. Weights in the checkpoint win.

    Raises:
      UserError: anything that does not fit; every tensor that is unknown, missing, duplicate or mis-shaped is listed.
    """
    opened = open_checkpoint(src, options, base=base, vision=vision)
    _write(dst, opened.config, opened.leaves, opened.tokenizer, opened.folders, options)


def compose(llm: str, vision: str, dst: str, options: Options, *, seed: int = 0) -> None:
    """The start of stage 1 (spec section 10): a text-only LLaMA, a CLIP, and a projector with random weights.

    The model has no compressor and no pre-fusion layers; training adds them with a chosen initialisation. Projector
    kernels are normal with the standard deviation of a torch Linear, 1/sqrt(3 * inputs); its biases are zero.

    Args:
      llm: folder or hub name of the LLaMA (Vicuna, LLaMA-3.1, ...).
      vision: folder or hub name of the CLIP.
      dst: the model folder to write.
      options: see `Options`.
      seed: of the projector's weights.

    Raises:
      UserError: as `from_hf`.
    """
    patterns = ignore_patterns(options.ignore)
    folder = resolve(llm)
    folders = [folder]
    tokenizer = _tokenizer(folders, options)
    vision_config, separate = encoder(vision, weights=True)
    path = folder / "config.json"
    config = text_model_from_hf(read_json(path), _generation(folders), vision_config, tokenizer, str(path))
    config = dataclasses.replace(config, template=options.template or config.template)
    tensors = _together(open_tensors(folder), separate)
    stored = [entry for entry in table(config) if not entry.tensor.startswith(_PROJECTOR)]
    leaves, ignored = match(stored, tensors, patterns, f"{llm} and {vision}")
    projector = _random_projector(config, tensors.leaves[EMBEDDING].dtype, seed)
    options.report(f"projector: random weights with seed {seed}, to be trained in stage 1")
    _report_ignored(ignored, options)
    _write(dst, config, leaves | projector, tokenizer, folders, options)


def _open(folder: Path, base: str | None) -> tuple[Tensors, list[Path]]:
    """The tensors of a checkpoint, and the folders that may hold its other files, the most specific first."""
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("format") == FORMAT:
        raise UserError(f"{folder} is a model folder already: there is nothing to convert")
    if not (folder / lora.ADAPTER_CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base is for LoRA adapters, but {folder} has no {lora.ADAPTER_CONFIG}")
        return open_tensors(folder), [folder]
    base_folder = resolve(base) if base is not None else _named_base(folder)
    return lora.merge(folder, open_tensors(base_folder)), [folder, base_folder]


def _named_base(folder: Path) -> Path:
    named = lora.read_adapter_config(folder).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise UserError(f"{folder / lora.ADAPTER_CONFIG} names no base model: give it with --base DIR")
    return folder / named if (folder / named).is_dir() else resolve(named)


def _together(tensors: Tensors, separate: Tensors) -> Tensors:
    both = Tensors(dict(tensors.leaves), tensors.faults + separate.faults)
    for name, leaf in separate.leaves.items():
        both.add(name, leaf, "the vision encoder")
    return both


def _tokenizer(folders: Sequence[Path], options: Options) -> Tokenizer:
    if options.tokenizer is None:
        tokenizer = read_tokenizer(folders)
    else:
        tokenizer = read_tokenizer([resolve(options.tokenizer, weights=False)])
        if tokenizer.folder is None:
            raise UserError(f"--tokenizer {options.tokenizer} holds neither {' nor '.join(VOCABULARIES)}")
    if tokenizer.folder is None:
        options.report(
            f"no tokenizer ({' or '.join(VOCABULARIES)}): the weights are converted, but `lmm ask` and `lmm chat` cannot read "
            "a question without one; convert again with --tokenizer DIR to add it"
        )
    return tokenizer


def _generation(folders: Sequence[Path]) -> Json:
    path = next((f / GENERATION for f in folders if (f / GENERATION).is_file()), None)
    return read_json(path) if path else {}


def _random_projector(config: ModelConfig, dtype: np.dtype, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    leaves = {}
    for entry in table(config):
        for name, shape in entry.leaves if entry.tensor.startswith(_PROJECTOR) else ():
            is_kernel = len(shape) == 2
            values = rng.standard_normal(shape, np.float32) / np.sqrt(3 * shape[0]) if is_kernel else np.zeros(shape)
            leaves[name] = values.astype(dtype)
    return leaves


def _report_ignored(ignored: Sequence[str], options: Options) -> None:
    if ignored:
        options.report(f"ignored {len(ignored)} tensors that the model does not use: {shorten(ignored)}")


def _write(
    dst: str,
    config: ModelConfig,
    leaves: dict[str, LazyLeaf | np.ndarray],
    tokenizer: Tokenizer,
    folders: Sequence[Path],
    options: Options,
) -> None:
    if options.dtype:
        leaves = {name: _cast(leaf, DTYPES[options.dtype]) for name, leaf in leaves.items()}
    total = sum(map(num_bytes, leaves.values()))
    files = files_to_copy(tokenizer, folders)
    with byte_bar(total, "converting") as advance:
        write_model(dst, config, leaves, files=files, progress=advance, overwrite=options.overwrite)
    options.report(f"wrote {dst}: {len(leaves)} leaves, {total / 1e9:.2f} GB, prompt template {config.template}")


def _cast(leaf: LazyLeaf | np.ndarray, dtype: np.dtype) -> LazyLeaf | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf.astype(dtype)
    return LazyLeaf(leaf.shape, dtype, lambda: leaf.read().astype(dtype, copy=False))
