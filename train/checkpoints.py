"""Checkpoints of a run, by Orbax, asynchronous: what is needed to go on as if nothing had happened.

    folder/checkpoints/120/   state (step, trained parameters, optimiser), position (batches done, records met, settings)

Frozen parameters are not among them: they are read again from the model folder that the run started from, or made again
from its seed.
"""

from __future__ import annotations

from typing import Any

import jax

from lmm_jax import storage
from lmm_jax.errors import UserError
from train.config import TrainConfig, to_json
from train.step import Params, TrainState

# settings that may change between two starts of a run: they decide how it is computed or recorded, not what
_FREE = ("folder", "record", "held_out", "compute.mesh", "compute.attention", "compute.remat", "compute.loss_chunk",
         "compute.xla_flags", "optimizer.accumulation", "data.threads", "data.prefetch", "data.cache",
         "data.max_skipped", "data.mixture", "data.sources", "start.folder", "start.tokenizer")  # fmt: skip
# of the last ones the content is compared, see `Identity`


Met = dict[str, int]  # records: "seen", and "skipped" among them
Identity = dict[str, str]  # what a run depends on beside its settings: name -> digest of its content


class Checkpoints:
    """The checkpoints of one run. All processes call every method alike."""

    def __init__(self, config: TrainConfig, *, read_only: bool = False) -> None:
        """Opens the folder, making it where there is none, and removes what a killed process left half-written.

        With `read_only` nothing is changed, so that a run may be training there meanwhile.
        """
        import orbax.checkpoint as ocp

        self._ocp, self._config, folder = ocp, config, storage.absolute(config.kept_in) / "checkpoints"
        if read_only and not folder.is_dir():
            raise UserError(f"the run in {config.kept_in} has no checkpoint yet")
        own = {"read_only": True} if read_only else {"max_to_keep": config.record.keep, "cleanup_tmp_directories": True}
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**own))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, met: Met, identity: Identity) -> None:
        """Starts to save; returns when the state may be changed. Nothing happens where that step is saved already."""
        if self._manager.latest_step() == step:
            return
        position = {"batches": step, "met": dict(met), "identity": identity, "settings": to_json(self._config)}
        saved = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeSave(_saved(state)), position=self._ocp.args.JsonSave(position)
        )
        self._manager.save(step, args=saved)

    def met(self) -> Met:
        """The counts that were saved with the latest checkpoint; none where there is none."""
        return self._position(self.latest()).get("met", {}) if self.latest() else {}

    def restore(self, state: TrainState, identity: Identity) -> TrainState:
        """The latest checkpoint, on the mesh of `state`, whose step, trained parameters and optimiser may be abstract.

        Raises:
          UserError: the run was started with other settings, data or frozen parameters; the checkpoint does not fit or is
            damaged.
        """
        position = self._position(self.latest())
        self._check_settings(position)
        changed = [name for name, digest in identity.items() if position["identity"].get(name) != digest]
        if changed:
            raise UserError(
                f"the run in {self._config.kept_in} was started with other {' and other '.join(changed)}: put them back, or "
                "choose another folder"
            )
        abstract, args = _saved(state), self._ocp.args
        wanted = args.PyTreeRestore(abstract, restore_args=self._ocp.checkpoint_utils.construct_restore_args(abstract))
        found = self._restore(self.latest(), state=wanted).state
        optimizer = jax.tree.unflatten(
            jax.tree.structure(state.optimizer), [leaf for _, leaf in sorted(found["optimizer"].items())]
        )
        return TrainState(found["step"], found["trained"], state.frozen, optimizer)

    def trained(self, abstract: Params, step: int) -> Params:
        """The trained parameters of a checkpoint, without its optimiser.

        Raises:
          UserError: see `restore`.
        """
        self._check_settings(self._position(step))
        tree, args = {"trained": abstract}, self._ocp.args
        how = self._ocp.checkpoint_utils.construct_restore_args(tree)
        return self._restore(step, state=args.PyTreeRestore(tree, restore_args=how, partial_restore=True)).state["trained"]

    def _position(self, step: int) -> dict[str, Any]:
        return self._restore(step, position=self._ocp.args.JsonRestore()).position

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {step} in {self._config.kept_in} cannot be restored ({str(error)[:300]}): remove it to "
                "go on from the one before, or choose another folder"
            ) from error

    def _check_settings(self, position: dict[str, Any]) -> None:
        before = _flat(position["settings"])
        now = _flat(to_json(self._config))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith(_FREE))
        if changed:
            what = "; ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed)
            raise UserError(
                f"the run in {self._config.kept_in} was started with other settings ({what}): give it the same ones, "
                "or choose another folder"
            )

    def wait(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        self.wait()
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
