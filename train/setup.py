"""Everything a run needs before its first step, from its configuration."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmm_jax import sharding
from lmm_jax.config import ModelConfig
from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.errors import UserError
from lmm_jax.models.attention import IMPLEMENTATIONS
from lmm_jax.models.llava_mini import LlavaMini
from train import xla
from train.config import GroupConfig, TrainConfig
from train.lora import init_lora, take_lora
from train.optimizer import assign_groups, make_optimizer, schedule
from train.start import abstract_start, initial_params, model_config, tokenizer_folder
from train.step import Arrays, Params, TrainState, init_optimizer, train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same through a run.

    Attributes:
      config: of the run.
      mesh: all devices take part.
      model: with the dtype of arithmetic.
      groups: path -> group, of all parameters.
      options: of the compiler, for the step.
      tokenizer: the model's; None where the run is only planned.
      rows: rows of a global batch that this process loads; none where the run is only planned.
    """

    config: TrainConfig
    mesh: Mesh
    model: LlavaMini
    groups: dict[str, GroupConfig]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))

    @property
    def trained(self) -> dict[str, GroupConfig]:
        """The groups of the trained parameters: path -> group."""
        return {path: group for path, group in self.groups.items() if group.learning_rate is not None}

    def batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Rows over devices."""
        return sharding.array_sharding(self.mesh, shape, "batch", *[None] * (len(shape) - 1))

    def put(self, arrays: dict[str, np.ndarray]) -> Arrays:
        """This process's rows -> global arrays."""
        total = self.config.data.batch_size

        def place(array: np.ndarray) -> jax.Array:
            shape = (total, *array.shape[1:])

            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(total)
                first = np.searchsorted(self.rows, start)
                return array[first : first + stop - start]

            return jax.make_array_from_callback(shape, self.batch_sharding(shape), part)

        return {name: place(array) for name, array in arrays.items()}

    def put_wish(self, wanted: bool) -> jax.Array:
        """What this process wants (0 or 1), once on each of its devices -> (devices of the mesh,) int32, to be summed.

        Rows of a batch would not do: several processes may hold the same ones, and each would see its own wish only.
        """
        each = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.make_array_from_callback((self.mesh.size,), each, lambda _: np.full(1, wanted, np.int32))

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps."""
        return make_optimizer(self.config.optimizer, self.trained, steps)

    def learning_rates(self, steps: int) -> dict[str, Callable[[int], Any]]:
        """Schedules by the pattern of their group."""
        found = {g.pattern: g.learning_rate for g in self.trained.values()}
        return {pattern: schedule(self.config.optimizer, peak, steps) for pattern, peak in found.items()}

    def step_function(self, steps: int) -> Callable[[TrainState, Arrays], tuple[TrainState, dict[str, jax.Array]]]:
        """The jitted step, which takes over the memory of the state it is given and leaves every leaf where it lies."""
        c = self.config
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(self, steps))
        step = functools.partial(train_step, self.model, self.optimizer(steps), c.compute.loss_chunk, c.optimizer.accumulation)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=self.options)


def prepare(config: TrainConfig) -> Setup:
    """Checks that a run can work, before anything is loaded.

    Raises:
      UserError: see `model_config`, `plan` and `xla.known`; a mesh that leaves out devices of several processes; Weights &
        Biases is wanted but not installed.
    """
    c = config.compute
    if config.record.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("record.wandb is set, but Weights & Biases is not installed: pip install wandb")
    mesh = sharding.make_mesh(c.mesh or {"fsdp": jax.device_count()})
    setup = plan(config, model_config(config.start), mesh)
    if setup.mesh.size != jax.device_count() and jax.process_count() > 1:
        raise UserError(f"mesh {c.mesh!r} leaves out some of {jax.device_count()} devices: with several processes use all")
    shape = (config.data.batch_size,)
    places = sharding.array_sharding(setup.mesh, shape, "batch").addressable_devices_indices_map(shape).values()
    rows = np.unique(np.concatenate([np.arange(config.data.batch_size)[place] for place in places]))
    options = xla.known(setup.options, c.xla_flags, mesh)
    return dataclasses.replace(setup, options=options, tokenizer=Tokenizer.load(tokenizer_folder(config.start)), rows=rows)


def plan(config: TrainConfig, sizes: ModelConfig, mesh: Mesh) -> Setup:
    """What a run would be on a mesh, whose devices need not be here; without tokenizer and rows.

    Args:
      config: of the run.
      sizes: of its model, see `model_config`.
      mesh: in place of the one that `config` names; an AbstractMesh does where nothing is compiled.

    Raises:
      UserError: see `assign_groups` and `xla.options`; a batch that the devices cannot share evenly; nothing to train.
    """
    c = config.compute
    if c.attention not in IMPLEMENTATIONS:
        raise UserError(f"there is no attention {c.attention!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    parts = sharding.batch_multiple(mesh) * config.optimizer.accumulation
    if config.data.batch_size % parts:
        raise UserError(
            f"batch_size {config.data.batch_size} is not a multiple of {parts}, the devices that share the rows "
            f"times accumulation {config.optimizer.accumulation}: change one of them"
        )
    dtype = jnp.dtype(c.dtype or (jnp.float32 if sharding.platform(mesh) == "cpu" else jnp.bfloat16))
    leaves = sharding.leaf_paths(abstract_start(sizes, config.lora, mesh, lambda _: dtype))
    groups = assign_groups(leaves, config.optimizer.groups)
    if all(group.learning_rate is None for group in groups.values()):
        raise UserError("no group has a learning_rate, so nothing would be trained: give one in optimizer.groups")
    return Setup(config, mesh, LlavaMini(sizes, dtype, c.attention, c.remat), groups, xla.options(mesh, c.xla_flags))


def abstract_state(setup: Setup, steps: int) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    flat = sharding.leaf_paths(abstract_start(setup.model.config, setup.config.lora, setup.mesh, _dtype_of(setup)))
    trained = {path: leaf for path, leaf in flat.items() if path in setup.trained}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    moments = jax.eval_shape(init_optimizer(setup.optimizer(steps)), trained)

    def shard(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        of = next((trained[k.key] for k in path if getattr(k, "key", None) in trained), None)  # a moment lies as its parameter
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of.sharding if of else everywhere)

    optimizer = jax.tree_util.tree_map_with_path(shard, moments)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), trained, frozen, optimizer)


def initial_params_of(setup: Setup, abstract: TrainState) -> tuple[Params, Params]:
    """Trained and frozen parameters of step 0, every device making or reading its own shards.

    Raises:
      UserError: see `start.initial_params`.
    """
    start, leaves = setup.config.start, {**abstract.trained, **abstract.frozen}
    tree = traverse_util.unflatten_dict(take_lora(leaves)[0], sep="/")
    params = sharding.leaf_paths(initial_params(start, setup.model.config, tree))
    if setup.config.lora.rank:
        params |= init_lora(leaves, setup.config.lora, start.seed)
    return {path: params[path] for path in abstract.trained}, {path: params[path] for path in abstract.frozen}


def initial_state(setup: Setup, abstract: TrainState) -> TrainState:
    """The state of step 0; raises as `initial_params_of`."""
    trained, frozen = initial_params_of(setup, abstract)
    shardings = jax.tree.map(lambda s: s.sharding, (abstract.step, abstract.optimizer))
    init = init_optimizer(setup.optimizer(1))
    step, optimizer = jax.jit(lambda p: (jnp.int32(0), init(p)), out_shardings=shardings)(trained)
    return TrainState(step, trained, frozen, optimizer)


def digest(params: Params) -> str:
    """Of the bits of parameters: the same on every mesh, in practice another one for other parameters."""
    sums = {path: int(_sum_of_bits(leaf)) for path, leaf in sorted(params.items())}
    return hashlib.blake2b(json.dumps(sums).encode(), digest_size=16).hexdigest()


@jax.jit
def _sum_of_bits(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    return bits.sum(dtype=jnp.uint32)


def _dtype_of(setup: Setup) -> Callable[[str], Any]:
    c, trained = setup.config.compute, setup.trained
    frozen = c.frozen_dtype or setup.model.dtype
    return lambda path: c.trained_dtype if path in trained else frozen
