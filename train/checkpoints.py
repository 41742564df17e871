"""Checkpoints of a run, by Orbax, asynchronous: what is needed to go on as if nothing had happened.

    folder/checkpoints/120/   state (step, trained parameters, optimiser), position (batches done, records met, settings)

Frozen parameters are not among them: they are read again from the model folder that the run started from, or made again
from its seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from lmm_jax.errors import UserError
from train.config import TrainConfig, to_json
from train.step import TrainState

# settings that may change between two starts of a run: they decide how it is computed or recorded, not what
_FREE = ("folder", "record", "held_out", "compute.mesh", "compute.attention", "compute.remat", "compute.loss_chunk",
         "data.threads", "data.prefetch", "data.cache", "data.max_skipped")  # fmt: skip


Met = dict[str, int]  # records: "seen", and "skipped" among them


class Checkpoints:
    """The checkpoints of one run. All processes call every method alike."""

    def __init__(self, config: TrainConfig) -> None:
        """Opens the folder, making it where there is none, and removes what a killed process left half-written."""
        import orbax.checkpoint as ocp

        self._ocp, self._config = ocp, config
        options = ocp.CheckpointManagerOptions(max_to_keep=config.record.keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(config.folder).resolve() / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, met: Met) -> None:
        """Starts to save; returns when the state may be changed. Nothing happens where that step is saved already."""
        if self._manager.latest_step() == step:
            return
        saved = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeSave(_saved(state)),
            position=self._ocp.args.JsonSave({"batches": step, "met": dict(met), "settings": to_json(self._config)}),
        )
        self._manager.save(step, args=saved)

    def met(self) -> Met:
        """The counts that were saved with the latest checkpoint; none where there is none."""
        return self._position().get("met", {}) if self.latest() else {}

    def restore(self, state: TrainState) -> TrainState:
        """The latest checkpoint, on the mesh of `state`, whose step, trained parameters and optimiser may be abstract.

        Raises:
          UserError: the run was started with other settings; the checkpoint does not fit or is damaged.
        """
        self._check_settings()
        abstract, args = _saved(state), self._ocp.args
        wanted = args.PyTreeRestore(abstract, restore_args=self._ocp.checkpoint_utils.construct_restore_args(abstract))
        found = self._restore(state=wanted).state
        optimizer = jax.tree.unflatten(
            jax.tree.structure(state.optimizer), [leaf for _, leaf in sorted(found["optimizer"].items())]
        )
        return TrainState(found["step"], found["trained"], state.frozen, optimizer)

    def _position(self) -> dict[str, Any]:
        return self._restore(position=self._ocp.args.JsonRestore()).position

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self.latest(), args=self._ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {self.latest()} in {self._config.folder} cannot be restored ({str(error)[:300]}): remove it to "
                "go on from the one before, or choose another folder"
            ) from error

    def _check_settings(self) -> None:
        before = _flat(self._position()["settings"])
        now = _flat(to_json(self._config))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith(_FREE))
        if changed:
            what = "; ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed)
            raise UserError(
                f"the run in {self._config.folder} was started with other settings ({what}): give it the same ones, "
                "or choose another folder"
            )

    def close(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _saved(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    return {
        "step": state.step,
        "trained": state.trained,
        "optimizer": {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)},
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()}
