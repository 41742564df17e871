"""Where arrays live: the mesh, and the two tables that place every parameter on it.

    parameter path --PARAMETER_AXES--> logical axes --MESH_RULES--> mesh axes

Nothing else in the project knows the names of mesh axes. Axis letters as in the model files: V vocabulary, D width,
N heads, K key/value heads, H channels of a head, F MLP width, Dv vision width.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmm_jax.errors import UserError

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")

MESH_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of a batch, and the flat axis of its images
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "table": ("fsdp", "tensor"),  # width of small tables that are looked up once per picture
    "small": (),  # a few KB, read in every layer: replicated
    "rank": (),  # of adapters (LoRA)
}

# Regular expression over the path of a leaf ("stack" and "last" left out) -> logical axes of the leaf.
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(layers|prefusion_layers)/self_attn/q_proj/kernel", ("embed", "heads", "head_dim")),
    (r"(layers|prefusion_layers)/self_attn/[kv]_proj/kernel", ("embed", "kv_heads", "head_dim")),
    (r"(layers|prefusion_layers)/self_attn/o_proj/kernel", ("heads", "head_dim", "embed")),
    (r"(layers|prefusion_layers)/mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
    (r"(layers|prefusion_layers)/mlp/down_proj/kernel", ("mlp", "embed")),
    (r"(layers|prefusion_layers)/(self_attn/[qkv]|mlp/(gate|up))_proj/lora_a", ("embed", "rank")),
    (r"(layers|prefusion_layers)/self_attn/q_proj/lora_b", ("rank", "heads", "head_dim")),
    (r"(layers|prefusion_layers)/self_attn/[kv]_proj/lora_b", ("rank", "kv_heads", "head_dim")),
    (r"(layers|prefusion_layers)/self_attn/o_proj/lora_a", ("heads", "head_dim", "rank")),
    (r"(layers|prefusion_layers)/mlp/(gate|up)_proj/lora_b", ("rank", "mlp")),
    (r"(layers|prefusion_layers)/mlp/down_proj/lora_a", ("mlp", "rank")),
    (r"(layers|prefusion_layers)/(self_attn/o|mlp/down)_proj/lora_b", ("rank", "embed")),
    (r"(layers|prefusion_layers)/(self_attn|mlp)/\w+_proj/lora_scale", ()),
    (r"((layers|prefusion_layers)/\w+_layernorm|norm)/scale", ("small",)),
    (r"mm_projector/linear_1/kernel", ("embed", "mlp")),
    (r"mm_projector/linear_1/bias", ("mlp",)),
    (r"mm_projector/linear_2/kernel", ("mlp", "embed")),
    (r"mm_projector/linear_2/bias", ("small",)),
    (r"compressor/(query|pos_embed)", ("small", "table")),
    (r"compressor/ln_\w+/(scale|bias)", ("small",)),
    (r"(compressor/attn|vision_tower/layers/self_attn)/[qkv]_proj/kernel", ("embed", "heads", "head_dim")),
    (r"(compressor/attn|vision_tower/layers/self_attn)/[qkv]_proj/bias", ("heads", "head_dim")),
    (r"(compressor/attn|vision_tower/layers/self_attn)/out_proj/kernel", ("heads", "head_dim", "embed")),
    (r"(compressor/attn|vision_tower/layers/self_attn)/out_proj/bias", ("small",)),
    (r"vision_tower/layers/mlp/fc1/kernel", ("embed", "mlp")),
    (r"vision_tower/layers/mlp/fc1/bias", ("mlp",)),
    (r"vision_tower/layers/mlp/fc2/kernel", ("mlp", "embed")),
    (r"vision_tower/layers/mlp/fc2/bias", ("small",)),
    (r"vision_tower/(layers/layer_norm\d|pre_layrnorm)/(scale|bias)", ("small",)),
    (r"vision_tower/embeddings/class_embedding", ("small",)),
    (r"vision_tower/embeddings/(patch_embedding/kernel|position_embedding/embedding)", ("small", "table")),
)


def make_mesh(spec: str | dict[str, int] | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of axes data, fsdp, tensor.

    Args:
      spec: sizes as ``"data=1,fsdp=8,tensor=1"`` or a dict; axes left out are 1; None is one device.
      devices: defaults to all devices of all processes; the first ``data·fsdp·tensor`` are used.

    Raises:
      UserError: unknown axis, a size that is no positive integer, or more devices wanted than there are.
    """
    sizes = mesh_sizes(spec)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise UserError(f"mesh {spec!r} needs {wanted} devices, but there are {len(devices)}: choose sizes whose product fits")
    if wanted < len(devices) and spec:
        logger.warning("mesh %s uses %d of %d devices", spec, wanted, len(devices))
    part_of_them = wanted < len(devices)
    shape, devices = tuple(sizes.values()), list(devices)[:wanted]
    if part_of_them:  # of a torus, which is none itself
        placed = np.asarray(devices).reshape(shape)
    else:  # a torus may have no axis as long as one of ours: then several of ours share it
        placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(spec: str | dict[str, int] | None) -> dict[str, int]:
    """The size of every axis; raises as `make_mesh`."""
    sizes = dict.fromkeys(MESH_AXES, 1) | (_parse_mesh(spec) if isinstance(spec, str) else dict(spec or {}))
    if set(sizes) - set(MESH_AXES) or any(not isinstance(n, int) or n < 1 for n in sizes.values()):
        raise UserError(f"mesh {spec!r} is not of the form data=2,fsdp=2,tensor=2 with positive sizes")
    return sizes


def _parse_mesh(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not match or match[1] in sizes:
            raise UserError(f"mesh {spec!r} is not of the form data=2,fsdp=2,tensor=2")
        sizes[match[1]] = int(match[2])
    return sizes


def batch_multiple(mesh: Mesh) -> int:
    """What the number of rows in a batch must be a multiple of, so that every device gets as many."""
    return math.prod(mesh.shape[a] for a in MESH_RULES["batch"])


def platform(mesh: Mesh | None = None) -> str:
    """cpu, gpu or tpu: of a mesh, or of the one that a program is made for, which need not be here; else JAX's own choice."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    device = getattr(mesh, "abstract_device", None)
    return device.platform if device else jax.default_backend()


def device_kind(mesh: Mesh) -> str:
    """What kind of device a mesh is of, as "TPU v5 lite"; "" where it does not say."""
    device = getattr(mesh.abstract_mesh, "abstract_device", None)
    return device.device_kind if device else ""


def leaf_paths(tree: Any) -> dict[str, Any]:
    """A nested dict flattened to {"a/b/c": leaf}."""
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def logical_axes(path: str, ndim: int) -> tuple[str, ...]:
    """Logical axes of the parameter at `path`, "layers" first where it is stacked.

    Raises:
      ValueError: the table does not cover the path exactly once, or with another number of axes.
    """
    name = re.sub(r"/(stack|last)(?=/)", "", path)
    found = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules of PARAMETER_AXES match {path}: exactly one must")
    axes = ("layers", *found[0]) if "/stack/" in path else found[0]
    if len(axes) != ndim:
        raise ValueError(f"{path} has {ndim} axes, PARAMETER_AXES says {axes}")
    return axes


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any, misfits: set[str]) -> PartitionSpec:
    """Mesh axes per array axis; an axis whose size does not divide is replicated and its name goes into `misfits`."""
    entries = []
    for name, size in zip(axes, shape):
        mesh_axes = tuple(a for a in (MESH_RULES[name] if name else ()) if mesh.shape[a] > 1)
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            misfits.add(f"{name} (size {size}, {parts} devices)")
            mesh_axes = ()
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def param_shardings(abstract: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a parameter tree (of arrays or ShapeDtypeStructs).

    Axes that the mesh does not divide are replicated, with one notice that names them all.

    Raises:
      ValueError: leaves that PARAMETER_AXES does not cover exactly once, all of them.
    """
    misfits: set[str] = set()
    faults, shardings = [], {}
    for path, leaf in leaf_paths(abstract).items():
        try:
            axes = logical_axes(path, len(leaf.shape))
            shardings[path] = NamedSharding(mesh, _spec(axes, leaf.shape, mesh, misfits))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    if misfits:
        logger.warning("replicated, since the mesh does not divide them: %s", ", ".join(sorted(misfits)))
    treedef = jax.tree.structure(abstract)
    return jax.tree.unflatten(treedef, list(shardings.values()))


def logical_spec(mesh: Any, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """Mesh axes of an array with the given logical axes; what does not divide is replicated."""
    return _spec(axes, shape, mesh, set())


def array_sharding(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
    """`logical_spec` on a mesh, for inputs and states."""
    return NamedSharding(mesh, logical_spec(mesh, shape, *axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay out `x` along logical axes, inside ``jax.set_mesh``; without a mesh returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(mesh, x.shape, *axes))
