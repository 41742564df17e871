"""The other side of a comparison of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import threads


class Theirs:
    """A script of this folder in another interpreter, which answers each line on its stdin with one of JSON on its stdout."""

    def __init__(self, python: str, script: str, folder: Path) -> None:
        """Starts it; it waits where it is not asked."""
        script = Path(__file__).with_name(script)
        command = [python, str(script), str(folder), "--threads", str(threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._read()

    def run(self, line: str) -> dict[str, Any]:
        """What it says to a line."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        return json.loads(line) if line else sys.exit("the PyTorch side has stopped, see above")

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()
