import collections

import numpy as np
import pytest
from crafting import CASES, GOLDEN, load

from conversion.from_hf import Options, from_hf
from conversion.names import table
from lmm_jax import sharding
from lmm_jax.checkpoint import disk_names, is_export_only, read_config
from lmm_jax.config import named_sizes
from lmm_jax.models.llava_mini import abstract_params


@pytest.mark.parametrize("size", named_sizes())
def test_the_table_covers_the_parameter_tree(size):
    config = named_sizes()[size]
    tree = abstract_params(config, sharding.make_mesh("data=8"))
    paths = sharding.leaf_paths(tree)
    in_memory = {
        name: paths[path].shape[1:] if "/stack/" in path else paths[path].shape
        for path, names in disk_names(tree).items()
        for name in names
    }
    on_disk = [leaf for entry in table(config) for leaf in entry.leaves]
    assert max(collections.Counter(name for name, _ in on_disk).values()) == 1
    assert {name: shape for name, shape in on_disk if not is_export_only(name, config)} == in_memory
    exported = {name for name, _ in on_disk if is_export_only(name, config)}
    assert len(exported) == 16 + 2  # a CLIP block and its last norm


@pytest.mark.parametrize("size", named_sizes())
def test_tensors_and_leaves_hold_the_same_number_of_values(size):
    entries = table(named_sizes()[size])
    assert len({entry.tensor for entry in entries}) == len(entries)
    for entry in entries:
        assert np.prod(entry.shape) == sum(np.prod(shape) for _, shape in entry.leaves), entry


@pytest.mark.parametrize("case", CASES)
def test_the_table_has_the_names_and_shapes_of_a_published_checkpoint(case, tmp_path):
    from_hf(str(GOLDEN / case / "hf"), str(tmp_path / "model"), Options())
    entries = table(read_config(tmp_path / "model"))
    assert {e.tensor: e.shape for e in entries} == {n: t.shape for n, t in load(GOLDEN / case / "hf").items()}


def test_full_size_shapes():
    shapes = {e.tensor: e.shape for e in table(named_sizes()["llava-mini-llama-3.1-8b"])}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (128256, 4096)
    assert shapes["model.prefusion_layers.3.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 14336)
    assert shapes["model.mm_projector.0.weight"] == (4096, 1024)
    assert shapes["model.compressor.attn.in_proj_weight"] == (3072, 1024)
    assert shapes["model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert sum(np.prod(s) for s in shapes.values()) == pytest.approx(9.2e9, rel=0.05)
