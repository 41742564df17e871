"""Makes the processes of a cluster one program, as the environment says."""

from __future__ import annotations

import os

from lmm_jax.errors import UserError

HELP = """\
On several machines start one process on each; LMM_COORDINATOR=host:port, LMM_PROCESSES=n and LMM_PROCESS=i say who is
who, where the cluster (a TPU pod, SLURM) does not: LMM_COORDINATOR=auto then asks it."""


def join_processes(patience: int = 300) -> None:
    """Does what the variables in `HELP` say, nothing without them; must come before any use of a device.

    Args:
      patience: seconds that a process which has come to its end waits for the others before all are ended.

    Raises:
      UserError: they are not complete, or the processes do not find each other.
    """
    import jax

    address, who = os.environ.get("LMM_COORDINATOR"), {}
    if not address:
        return
    if address != "auto":
        try:
            count, own = int(os.environ["LMM_PROCESSES"]), int(os.environ["LMM_PROCESS"])
        except (KeyError, ValueError) as error:
            raise UserError("LMM_COORDINATOR=host:port also needs LMM_PROCESSES and LMM_PROCESS, two numbers") from error
        who = {"coordinator_address": address, "num_processes": count, "process_id": own}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the program's own affair
    try:
        jax.distributed.initialize(**who, shutdown_timeout_seconds=patience)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes do not find each other at LMM_COORDINATOR={address}: {error}") from error
