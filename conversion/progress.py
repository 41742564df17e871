"""The progress bar of a conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_bar(total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A bar on stderr that counts bytes, shown on a terminal only; yields the function that advances it."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        yield bar.update
