"""What figures are taken on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(*packages: str) -> dict[str, object]:
    """Processor, memory, and versions of Python and of the packages."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def peak_bytes() -> int:
    """Most memory that this process has had (Linux); of its own, not of the one that started it."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
