"""Image prefixes kept on the device for the next question on the same picture; least recently used go first."""

from __future__ import annotations

import collections
import hashlib

import jax
import numpy as np

from lmm_jax.models.llava_mini import ImagePrefix


class PrefixCache:
    """A map from pictures to their ImagePrefix, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Holds at most `max_bytes` of device memory; 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self._entries: collections.OrderedDict[bytes, ImagePrefix] = collections.OrderedDict()

    @staticmethod
    def key(pixels: np.ndarray) -> bytes:
        """What tells pictures apart: dtype, shape and all bytes of (P,H,W,3)."""
        digest = hashlib.blake2b(f"{pixels.dtype}{pixels.shape}".encode(), digest_size=20)
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()

    def get(self, key: bytes) -> ImagePrefix | None:
        """The prefix of one image (N = 1), or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return self._entries[key]

    def put(self, key: bytes, prefix: ImagePrefix) -> None:
        """Keeps a prefix of one image; one that is larger than the whole cache is not kept."""
        size = _nbytes(prefix)
        if key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = prefix
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= _nbytes(self._entries.popitem(last=False)[1])

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.bytes = 0


def _nbytes(prefix: ImagePrefix) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prefix))
