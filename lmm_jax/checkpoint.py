"""Model folders: ``config.json``, tokenizer files and ``params/``; written whole or not at all, loaded onto any mesh.

On disk a model is a flat set of leaves, one per layer ("layers.7.mlp.up_proj.kernel"); in memory equal layers are
stacked ("layers/stack/mlp/up_proj/kernel"[7]). `disk_names` is the one place that knows both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import glob
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from lmm_jax import checkpoint_io, checkpoint_mesh, storage
from lmm_jax.checkpoint_io import LazyLeaf
from lmm_jax.checkpoint_mesh import Source
from lmm_jax.config import FORMAT, ModelConfig, from_json, to_json
from lmm_jax.errors import UserError
from lmm_jax.sharding import leaf_paths

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"
_MARK = ".growing"


# ---------------------------------------------------------------------------------------------------------------- names


def disk_names(tree: Any) -> dict[str, tuple[str, ...]]:
    """Path of each leaf in memory -> its names on disk: one, or one per layer for what is stacked.

        X/stack/rest  ->  X.0.rest, X.1.rest, …, X.{n-1}.rest
        X/last/rest   ->  X.{n}.rest       (n stacked layers under X, or 0)
        X/rest        ->  X.rest

    Args:
      tree: nested dict of arrays or ShapeDtypeStructs.
    """
    leaves = leaf_paths(tree)
    depth = {path.split("/stack/")[0]: leaf.shape[0] for path, leaf in leaves.items() if "/stack/" in path}
    names = {}
    for path in leaves:
        if "/stack/" in path:
            group, rest = path.split("/stack/")
            found = [f"{group}/{i}/{rest}" for i in range(depth[group])]
        elif "/last/" in path:
            group, rest = path.split("/last/")
            found = [f"{group}/{depth.get(group, 0)}/{rest}"]
        else:
            found = [path]
        names[path] = tuple(name.replace("/", ".") for name in found)
    return names


def unstack(params: Any) -> dict[str, LazyLeaf]:
    """Parameters in memory as leaves for `write_model`; a layer is copied to the host when it is written.

    Args:
      params: nested dict of arrays, wholly addressable from this process.
    """
    leaves = {}
    arrays = leaf_paths(params)
    for path, names in disk_names(params).items():
        array = arrays[path]
        if "/stack/" not in path:
            leaves[names[0]] = LazyLeaf(array.shape, array.dtype, lambda array=array: np.asarray(array))
            continue
        for i, name in enumerate(names):
            leaves[name] = LazyLeaf(array.shape[1:], array.dtype, lambda array=array, i=i: np.asarray(array[i]))
    return leaves


def is_export_only(name: str, config: ModelConfig) -> bool:
    """Whether a leaf on disk exists only to be exported: CLIP's last block and the norm after it are never run."""
    return name.startswith((f"vision_tower.layers.{config.vision.num_layers - 1}.", "vision_tower.post_layernorm."))


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(folder: Path | str) -> ModelConfig:
    """The configuration of a model folder.

    Raises:
      UserError: no such folder, not a model folder (one of Hugging Face that is not converted, for instance), or broken.
    """
    try:
        with storage.reaching(folder):
            return _read_config(storage.as_path(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error}): give a model folder") from error


def _read_config(folder: Path) -> ModelConfig:
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a model folder" if folder.exists() else f"there is no folder {folder}")
    data = _config_data(folder)
    if data is None or data.get("format") != FORMAT:
        weights = [file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
        if weights or "model_type" in (data or {}):
            raise UserError(
                f"{folder} is a Hugging Face checkpoint that is not converted yet: "
                f"run `python -m conversion from-hf {folder} DST` and use DST"
            )
        what = "is empty" if not any(folder.iterdir()) else f"has no {CONFIG_FILE} of {FORMAT}"
        raise UserError(f"{folder} {what}: it is no model folder")
    try:
        config = from_json(data)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is broken: {error}") from error
    if not (folder / PARAMS_FOLDER / checkpoint_io.MANIFEST).is_file():
        raise UserError(f"{folder} has a {CONFIG_FILE} but no parameters: copy or convert it again")
    return config


def _config_data(folder: Path) -> dict[str, Any] | None:
    """The content of ``config.json``, None where there is none."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read ({error}): copy or convert the folder again") from error
    if not isinstance(data, dict):
        raise UserError(f"{folder / CONFIG_FILE} does not hold an object: copy or convert the folder again")
    return data


def leaf_shapes(folder: Path | str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Disk name -> (shape, dtype) of every leaf in a model folder.

    Raises:
      UserError: the folder is damaged.
    """
    return {name: (store.shape, store.dtype.numpy_dtype) for name, store in _open(storage.as_path(folder)).items()}


def read_leaf(folder: Path | str, name: str) -> np.ndarray:
    """One leaf of a model folder, as stored.

    Raises:
      UserError: the folder is damaged, or has no such leaf.
    """
    folder = storage.as_path(folder)
    with checkpoint_io.damage_is_a_user_error(folder):
        return checkpoint_io.open_array(_params(folder), name).read().result()


def load_params(
    folder: Path | str,
    abstract: Any,
    *,
    dtype: Any = None,
    layers_apart: bool = False,
    whole: bool = False,
    each: Callable[[str, jax.Array], Any] | None = None,
) -> Any:
    """Reads the parameters of a model folder, each device's slice straight from the disk.

    A process reads what its own devices hold and no more; beside the array that grows a thirty-second of it, or 64 MB, is on
    its way.

    Args:
      folder: a model folder.
      abstract: the parameter tree as ShapeDtypeStructs with `.sharding`; arrays are cast to its dtypes.
      dtype: in place of the dtypes of `abstract`.
      layers_apart: a stack of layers (L, …) becomes a tuple of L arrays (…).
      whole: a stack that lacks its last layer, which is by itself, has it as well: (L + 1, …).
      each: is given the path of each leaf ("layers/stack/mlp/up_proj/kernel") and its array, or each of its layers' where they
        are apart, as soon as it is there; what it returns, an array or a tree of them, takes its place.

    Returns:
      A tree like `abstract` of jax Arrays.

    Raises:
      UserError: not a model folder; missing, unexpected or mis-shaped leaves (all of them); damaged data.
    """
    folder = storage.as_path(folder)
    config = read_config(folder)
    names = disk_names(abstract)
    leaves = {path: leaf.update(dtype=jnp.dtype(dtype or leaf.dtype)) for path, leaf in leaf_paths(abstract).items()}
    for path in [path for path in leaves if whole and "/stack/" in path]:
        names[path] += names.get(path.replace("/stack/", "/last/"), ())
        leaves[path] = leaves[path].update(shape=(len(names[path]), *leaves[path].shape[1:]))
    stores = _open(folder, checkpoint_mesh.host_bytes(leaves.values()))
    wanted = {n: leaf.shape[1:] if "/stack/" in path else leaf.shape for path, leaf in leaves.items() for n in names[path]}
    faults = [f"{name} is missing" for name in wanted if name not in stores]
    faults += [f"{n} has shape {stores[n].shape}, not {s}" for n, s in wanted.items() if n in stores and stores[n].shape != s]
    faults += [f"{name} is unknown to the model" for name in stores if name not in wanted and not is_export_only(name, config)]
    if faults:
        raise UserError(f"the parameters in {folder} do not fit the model: " + "; ".join(faults))
    sources = []
    for path, leaf in leaves.items():
        layers, is_stack = [stores[name] for name in names[path]], "/stack/" in path
        if is_stack and layers_apart:
            sources.extend(Source(path, [layer], checkpoint_mesh.layer_of(leaf), False) for layer in layers)
        else:
            sources.append(Source(path, layers, leaf, is_stack))
    loaded: dict[str, list[Any]] = {path: [] for path in leaves}
    for path, array in checkpoint_mesh.read_in_order(folder, sources):
        loaded[path].append(array if each is None else jax.block_until_ready(each(path, array)))
        del array  # before the next one is read
        if each is not None:
            gc.collect(0)  # only then does JAX let go of memory that it has from NumPy
    found = [tuple(of) if layers_apart and "/stack/" in path else of[0] for path, of in loaded.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), found)


def place_leaves(leaves: Mapping[str, LazyLeaf], abstract: Any) -> Any:
    """Parameters from leaves by their names on disk, each device's slice read alone where the leaf can do that.

    Args:
      leaves: all that `disk_names` names, of the right shapes.
      abstract: the parameter tree as ShapeDtypeStructs with `.sharding`; values are cast to its dtypes.
    """

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        layers, read = [_read_once(leaves[name]) for name in names[path]], {}

        def at(index: tuple[slice, ...]) -> np.ndarray:
            index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape))
            key = str(index)  # devices that hold the same share what is read
            if key not in read:
                found = [x.take(index[1:]) for x in layers[index[0]]] if "/stack/" in path else layers[0].take(index)
                read[key] = np.asarray(found, leaf.dtype)
            return read[key]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, at)

    names, paths = disk_names(abstract), leaf_paths(abstract)
    return jax.tree.unflatten(jax.tree.structure(abstract), [place(path, leaf) for path, leaf in paths.items()])


def _read_once(leaf: LazyLeaf) -> LazyLeaf:
    """A leaf that, where it cannot read a part of itself, keeps the whole for the next part."""
    return leaf if leaf.part else dataclasses.replace(leaf, read=functools.cache(leaf.read))


def _params(folder: Path) -> Path:
    return storage.absolute(folder) / PARAMS_FOLDER


def _open(folder: Path, filling: int = 0) -> dict[str, ts.TensorStore]:
    with checkpoint_io.damage_is_a_user_error(folder):
        return checkpoint_io.open_arrays(_params(folder), filling)


# -------------------------------------------------------------------------------------------------------------- writing


def write_model(
    folder: Path | str,
    config: ModelConfig,
    leaves: Mapping[str, LazyLeaf | np.ndarray],
    *,
    files: Iterable[Path] = (),
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model folder. It appears at `folder` whole, at the very end, whatever happens before.

    Until then it grows in a hidden folder beside it, which is removed when writing fails, or by the next write to the
    same name when this process is killed. In a bucket, where nothing can be renamed, it is copied from there at the end.

    Args:
      folder: new or empty; or, with `overwrite`, a model folder, which is replaced when the new one is complete.
      config: the model's configuration.
      leaves: disk name -> leaf, produced one after the other; at most half a gigabyte of them (or one) is held at a time.
      files: tokenizer files to copy.
      progress: called with the bytes of each leaf that is written.
      overwrite: replace a model folder.

    Raises:
      UserError: `folder` is taken, or the disk is full, read-only or not permitted. Errors of `LazyLeaf.read` pass through.
    """
    size = sum(map(checkpoint_io.num_bytes, leaves.values()))
    remote = storage.is_remote(folder)
    with _bucket_folder(folder, overwrite) if remote else whole_folder(folder, size, overwrite=overwrite) as growing:
        checkpoint_io.write_arrays(growing / PARAMS_FOLDER, leaves, progress)
        for file in files:
            (growing / file.name).write_bytes(file.read_bytes())
        (growing / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path | str, size: int, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `folder` when the block ends well and disappears otherwise.

    Args:
      folder: see `write_model`.
      size: bytes that are going to be written.
      overwrite: see `write_model`.

    Raises:
      UserError: `folder` is taken, or the disk refuses or has less than `size` bytes left. Errors of the block pass through.
    """
    if storage.is_remote(folder):
        raise UserError(f"{folder} is in a bucket: give a folder of this machine, and copy it there")
    folder = Path(folder).resolve()
    writer = f"{platform.node()}-{os.getpid()}"
    growing, old = (folder.parent / f".{folder.name}.{kind}-{writer}" for kind in ("tmp", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _refuse_taken(folder, overwrite)
        free = shutil.disk_usage(folder.parent).free
        if size > free:
            raise UserError(f"{folder} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left: make room")
        growing.mkdir()
        try:
            yield growing
            if overwrite and folder.exists():
                folder.rename(old)
            growing.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(growing, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error}): nothing was written") from error


@contextlib.contextmanager
def _bucket_folder(folder: Path | str, overwrite: bool) -> Iterator[Path]:
    """A folder in a bucket to write into, which is copied to `folder` when the block ends well, ``config.json`` last.

    While it is copied `folder` is marked and no model folder; the next writer takes its place. Raises as `whole_folder`.
    """
    folder = storage.as_path(folder)
    growing, mark = folder.parent / f".{folder.name}.growing", folder / _MARK
    try:
        with storage.reaching(folder):
            if not is_unfinished(folder):
                _refuse_taken(folder, overwrite)
            storage.remove(growing)
        yield growing
        with storage.reaching(folder):
            mark.write_text("")
            (folder / CONFIG_FILE).unlink(missing_ok=True)  # first: what is left of a model is none
            storage.remove(folder, but=(_MARK,))
            storage.copy(growing, folder, last=CONFIG_FILE)
            mark.unlink()
            storage.remove(growing)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error})") from error


def is_unfinished(folder: Path) -> bool:
    """Whether it is what a writer left in a bucket that was killed, and so no model folder."""
    remote = storage.is_remote(folder)
    return remote and storage.exists(folder / _MARK) and not storage.exists(folder / CONFIG_FILE)


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not overwrite:
        raise UserError(f"{folder} exists already: choose another name or ask to overwrite it")
    if (_config_data(folder) or {}).get("format") != FORMAT:
        raise UserError(f"{folder} is not a model folder of {FORMAT}, so it is not overwritten: choose another name")


def _remove_leftovers(folder: Path) -> None:
    """Removes what writers to `folder` left that were killed; what one had just moved out of the way is moved back."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*-*"):
        kind, _, writer = path.name.removeprefix(f".{folder.name}.").partition("-")
        host, _, pid = writer.rpartition("-")
        if kind not in ("tmp", "old") or host != platform.node() or not pid.isdigit() or _runs(int(pid)):
            continue
        if kind == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path)


def _runs(pid: int) -> bool:
    """Whether another process of that number runs on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
