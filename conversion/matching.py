"""Match what a checkpoint holds against the table of names: strict, and everything that is wrong in one error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import ml_dtypes
import numpy as np

from conversion.names import EMBEDDING, HEAD, Entry
from conversion.readers import Fault, Tensors, listed
from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.errors import UserError

WEIGHT_DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))

# What real checkpoints carry besides weights that this model uses; `--ignore` adds to it.
IGNORED = (
    r"rotary_emb\.inv_freq$",  # a function of rope_theta, stored by transformers before 4.32
    r"embeddings\.position_ids$",  # 0, 1, 2, ..., stored by transformers before 4.31
    r"(^|\.)text_model\.",  # the other half of a whole CLIP ...
    r"(^|\.)visual_projection\.",  # ... and what joins the halves
    r"(^|\.)text_projection\.",
    r"(^|\.)logit_scale$",
)


def ignore_patterns(more: Iterable[str] = ()) -> list[re.Pattern[str]]:
    """`IGNORED` and the user's own regular expressions, searched for anywhere in a name.

    Raises:
      UserError: not a regular expression.
    """
    patterns = [re.compile(p) for p in IGNORED]
    for text in more:
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise UserError(f"--ignore {text!r} is not a regular expression: {error}") from None
    return patterns


def match(
    table: Sequence[Entry], tensors: Tensors, ignore: Iterable[re.Pattern[str]], where: str
) -> tuple[dict[str, LazyLeaf], list[str]]:
    """The leaves of `table`, each reading from its tensor, and the names that were ignored.

    Raises:
      UserError: listing every unknown, missing, duplicate, mis-shaped tensor, and those of another dtype than fp16, bf16
        and fp32.
    """
    found = tensors.leaves
    patterns = list(ignore)
    ignored = {name for name in found if any(pattern.search(name) for pattern in patterns)}
    faults = [fault for fault in tensors.faults if fault.name not in ignored]
    known = {entry.tensor for entry in table}
    if HEAD in found and HEAD not in known | ignored:
        ignored.add(HEAD)
        if not _equal(found[HEAD], found.get(EMBEDDING)):
            faults.append(Fault("differs from the embedding although tie_word_embeddings is true", HEAD))
    usable = found.keys() - ignored
    faults += [Fault("unknown", name) for name in usable - known]
    leaves = {}
    for entry in table:
        if entry.tensor not in usable:
            faults.append(Fault("missing", entry.tensor))
            continue
        tensor = found[entry.tensor]
        if tensor.shape != entry.shape:
            faults.append(Fault("wrong shape", entry.tensor, f" {tensor.shape}, expected {entry.shape}"))
        if tensor.dtype not in WEIGHT_DTYPES:
            faults.append(Fault("wrong dtype", entry.tensor, f" {tensor.dtype}, expected fp16, bf16 or fp32"))
        for index, (name, shape) in enumerate(entry.leaves):
            part = _part_reader(entry, index, tensor) if tensor.part else None
            leaves[name] = LazyLeaf(shape, tensor.dtype, _reader(entry, index, tensor), part)
    if faults:
        raise UserError(f"the tensors of {where} do not fit its configuration, nothing was written: {listed(faults)}")
    return leaves, sorted(ignored)


def _reader(entry: Entry, index: int, tensor: LazyLeaf) -> Callable[[], np.ndarray]:
    return lambda: entry.leaf(index, tensor.read())


def _part_reader(entry: Entry, number: int, tensor: LazyLeaf) -> Callable[[tuple[slice, ...]], np.ndarray]:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        place = entry.place(number, index)
        if place is None:
            return entry.leaf(number, tensor.read())[index]
        shape = tuple(part.stop - part.start for part in index)
        return np.ascontiguousarray(entry.transform.forward(tensor.part(place), shape))

    return read


def _equal(head: LazyLeaf, embedding: LazyLeaf | None) -> bool:
    if embedding is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    return np.array_equal(head.read().view(np.uint8), embedding.read().view(np.uint8))
