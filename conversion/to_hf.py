"""Model folder -> Hugging Face checkpoint that the published PyTorch code loads."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from conversion.hf_config import Json, model_to_hf, preprocessor_to_hf, vision_to_hf
from conversion.hub import is_hub_name
from conversion.names import VISION_PREFIX, Entry, table
from conversion.progress import byte_bar
from conversion.readers import Fault, listed
from conversion.tokenizers import files_to_copy, read_tokenizer
from conversion.writers import Output, copy_files, num_bytes, plan_shards, write_safetensors
from lmm_jax import storage
from lmm_jax.checkpoint import leaf_shapes, read_config, read_leaf, whole_folder
from lmm_jax.data.tokenize import TOKENIZER_FILES
from lmm_jax.errors import UserError

VISION_FOLDER = "vision_tower"


def to_hf(src: str, dst: str, *, max_shard_bytes: int = 5 * 10**9, report: Callable[[str], object] = print) -> None:
    """Exports a model folder: safetensors, config.json and tokenizer files. Writes all of `dst` or nothing.

    The vision encoder's weights are inside. Where the encoder has no hub name, it is also written to a folder of its own
    that ``mm_vision_tower`` points to, since the published code reads the encoder's configuration from there.

    Args:
      src: the model folder.
      dst: new or empty folder.
      max_shard_bytes: a larger model is cut into several files with an index; a single larger tensor has its own.
      report: receives each line that tells what was done.

    Raises:
      UserError: `src` is no whole model folder, `dst` is taken, or the disk is full.
    """
    config = read_config(src)
    outputs = _outputs(src, table(config))
    named = is_hub_name(config.vision.name)
    encoder = [] if named else [_rename(o) for o in outputs if o.name.startswith(VISION_PREFIX)]
    total = sum(map(num_bytes, outputs + encoder))
    folders = [storage.local_folder(src, TOKENIZER_FILES)]
    with whole_folder(dst, total) as growing, byte_bar(total, "exporting") as advance:
        _write_json(
            growing / "config.json", model_to_hf(config, _dtype(outputs), config.vision.name if named else VISION_FOLDER)
        )
        copy_files(files_to_copy(read_tokenizer(folders), folders), growing)
        _write_shards(growing, outputs, max_shard_bytes, advance)
        if encoder:
            folder = growing / VISION_FOLDER
            folder.mkdir()
            _write_json(folder / "config.json", vision_to_hf(config.vision, _dtype(encoder)))
            _write_json(folder / "preprocessor_config.json", preprocessor_to_hf(config.vision))
            write_safetensors(folder / "model.safetensors", encoder, advance)
    report(f"wrote {dst}: {len(outputs)} tensors, {total / 1e9:.2f} GB")
    if encoder:
        report(f"the published code opens mm_vision_tower ({VISION_FOLDER}) from its working directory: run it inside {dst}")


def _outputs(src: str, entries: Sequence[Entry]) -> list[Output]:
    """The tensors to write, each reading its leaves when asked for.

    Raises:
      UserError: listing the leaves that are missing, unknown, mis-shaped, or of several dtypes within one tensor.
    """
    stored = leaf_shapes(src)
    wanted = {name: shape for entry in entries for name, shape in entry.leaves}
    faults = [Fault("missing", name) for name in wanted.keys() - stored.keys()]
    faults += [Fault("unknown", name) for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        if tuple(stored[name][0]) != wanted[name]:
            faults.append(Fault("wrong shape", name, f" {stored[name][0]}, expected {wanted[name]}"))
    for entry in entries:
        if len({stored[name][1] for name, _ in entry.leaves if name in stored}) > 1:
            faults.append(Fault("several dtypes", entry.tensor))
    if faults:
        raise UserError(f"the parameters in {src} do not fit its configuration, nothing was written: {listed(faults)}")

    def reader(entry: Entry) -> Callable[[], np.ndarray]:
        return lambda: entry.join([read_leaf(src, name) for name, _ in entry.leaves])

    return [Output(e.tensor, e.shape, np.dtype(stored[e.leaves[0][0]][1]), reader(e)) for e in entries]


def _rename(output: Output) -> Output:
    """As in a CLIP of its own."""
    return output._replace(name="vision_model." + output.name.removeprefix(VISION_PREFIX))


def _dtype(outputs: Sequence[Output]) -> str:
    """The dtype of most bytes."""
    count: collections.Counter[str] = collections.Counter()
    for output in outputs:
        count[output.dtype.name] += num_bytes(output)
    return count.most_common(1)[0][0]


def _write_shards(folder: Path, outputs: Sequence[Output], limit: int, advance: Callable[[int], object]) -> None:
    shards = plan_shards(outputs, limit)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", outputs, advance)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, advance)
        weight_map |= {output.name: name for output in shard}
    index = {"metadata": {"total_size": sum(map(num_bytes, outputs))}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, data: Json) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
