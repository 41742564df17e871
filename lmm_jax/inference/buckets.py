"""Sizes that shapes are rounded up to, so that the number of compiled programs is bounded."""

from __future__ import annotations


def bucket(n: int, smallest: int = 1) -> int:
    """The first of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least `n` and `smallest`: at most half is padding."""
    size = 1
    while True:
        for candidate in (size, size * 3 // 2):
            if candidate >= max(n, smallest):
                return candidate
        size *= 2


def image_bucket(n: int, chunk: int) -> int:
    """Room for `n` images: a power of two up to `chunk`, then a multiple of `chunk`."""
    if n <= chunk:
        return 1 << max(n - 1, 0).bit_length()
    return bucket(-(-n // chunk)) * chunk
