"""``python -m lmm_jax`` is the command `lmm`."""

import sys

from lmm_jax.cli import command

if __name__ == "__main__":
    sys.exit(command())
