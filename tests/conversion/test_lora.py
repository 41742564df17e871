import json

import ml_dtypes
import numpy as np
import pytest
from crafting import GOLDEN, checkpoint, leaves, load, write_bin, write_config
from safetensors.numpy import save_file

from conversion.from_hf import Options, from_hf
from lmm_jax.errors import UserError

RNG = np.random.default_rng(0)
TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.prefusion_layers.1.self_attn.v_proj")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "modules_to_save": None}
QUIET = Options(report=lambda line: None)


def adapter(folder, base, kind="safetensors", rename=lambda n: f"base_model.model.{n}", **config):
    """An adapter on `TARGETS` with an mm_projector of its own -> its folder and the tensors merged by hand."""
    folder.mkdir()
    config = CONFIG | config
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors, merged = {}, dict(base)
    for target in TARGETS:
        w = base[f"{target}.weight"]
        a = RNG.standard_normal((4, w.shape[1])).astype(np.float32)
        b = RNG.standard_normal((w.shape[0], 4)).astype(np.float32)
        tensors |= {rename(f"{target}.lora_A.weight"): a, rename(f"{target}.lora_B.weight"): b}
        merged[f"{target}.weight"] = (w.astype(np.float32) + np.float32(scale) * (b @ a)).astype(w.dtype)
    projector = {n: RNG.standard_normal(t.shape).astype(np.float16) for n, t in base.items() if "mm_projector" in n}
    write_bin(folder / "non_lora_trainables.bin", {rename(n): t for n, t in projector.items()})
    if kind == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        write_bin(folder / "adapter_model.bin", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged | projector


def expected(tmp_path, merged):
    from_hf(str(checkpoint(tmp_path / "merged", merged)), str(tmp_path / "expected"), QUIET)
    return leaves(tmp_path / "expected")


@pytest.fixture(scope="module")
def base():
    return {name: t.astype(ml_dtypes.bfloat16) for name, t in load(GOLDEN / "image_c1/hf").items()}


@pytest.mark.parametrize(
    "kind, use_rslora, rename",
    [
        ("safetensors", False, lambda n: f"base_model.model.{n}"),
        ("bin", True, lambda n: f"base_model.model.model.{n}"),
        ("bin", False, lambda n: f"base_model.model.{n}".replace(".weight", ".default.weight") if "lora_" in n else n),
    ],
)
def test_merging_equals_numpy(tmp_path, base, kind, use_rslora, rename):
    checkpoint(tmp_path, base)
    folder, merged = adapter(tmp_path / "lora", base, kind, rename, use_rslora=use_rslora)
    from_hf(str(folder), str(tmp_path / "model"), QUIET, base=str(tmp_path / "hf"))
    got, want = leaves(tmp_path / "model"), expected(tmp_path, merged)
    assert got.keys() == want.keys()
    plain = checkpoint(tmp_path / "plain", base)
    from_hf(str(plain), str(tmp_path / "unmerged"), QUIET)
    changed = {n for n, leaf in leaves(tmp_path / "unmerged").items() if leaf.tobytes() != got[n].tobytes()}
    assert len(changed) == len(TARGETS) + 4
    for name, leaf in got.items():
        assert leaf.dtype == want[name].dtype, name
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)


def test_the_base_is_found_by_name_and_llava_configures_the_adapter(tmp_path):
    """LLaVA: the base is a text-only LLaMA, the adapter's folder has the config.json and the projector."""
    whole = load(GOLDEN / "llava_v1_5/hf")
    base_folder = checkpoint(tmp_path / "base", {n: t for n, t in whole.items() if "mm_projector" not in n}, "llava_v1_5")
    folder, merged = adapter_v1_5(tmp_path, whole)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": "../base/hf"}))
    write_config(folder, "llava_v1_5", mm_vision_tower="../base/clip")
    from_hf(str(folder), str(tmp_path / "model"), QUIET)
    (base_folder / "model.safetensors").unlink()
    save_file(merged, base_folder / "model.safetensors")
    from_hf(str(base_folder), str(tmp_path / "expected"), QUIET)
    got, want = leaves(tmp_path / "model"), leaves(tmp_path / "expected")
    assert {n: t.tobytes() for n, t in got.items()} == {n: t.tobytes() for n, t in want.items()}


def adapter_v1_5(tmp_path, whole):
    folder = tmp_path / "lora"
    folder.mkdir()
    projector = {n: t for n, t in whole.items() if "mm_projector" in n}
    write_bin(folder / "non_lora_trainables.bin", {f"base_model.model.{n}": t for n, t in projector.items()})
    w = whole["lm_head.weight"]
    a, b = np.ones((4, w.shape[1]), np.float32), RNG.standard_normal((w.shape[0], 4)).astype(np.float32)
    pair = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    write_bin(folder / "adapter_model.bin", pair)
    return folder, whole | {"lm_head.weight": w + np.float32(2) * (b @ a)}


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 8}},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"r": 0},
        {"lora_alpha": None},
    ],
)
def test_unsupported_features_are_named(tmp_path, base, config):
    checkpoint(tmp_path, base)
    folder, _ = adapter(tmp_path / "lora", base)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(UserError, match=f"{next(iter(config))} .*{next(iter(config.values()))!r}".replace("[", r"\[")):
        from_hf(str(folder), str(tmp_path / "model"), QUIET, base=str(tmp_path / "hf"))
    assert not (tmp_path / "model").exists()


def test_adapter_tensors_that_fit_nothing_are_all_listed(tmp_path, base):
    checkpoint(tmp_path, base)
    folder, _ = adapter(tmp_path / "lora", base)
    tensors = load(folder)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    tensors[name] = tensors[name][:, :-1].copy()
    nowhere = "base_model.model.model.layers.9.mlp.up_proj.lora_{}.weight"
    tensors |= {nowhere.format(x): np.ones((4, 4), np.float32) for x in "AB"}
    tensors["base_model.model.model.layers.0.lora_magnitude_vector"] = np.ones(4, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        from_hf(str(folder), str(tmp_path / "model"), QUIET, base=str(tmp_path / "hf"))
    for part in (
        "missing (1): model.layers.0.self_attn.q_proj (LoRA)",
        "wrong shape (1): model.layers.2.mlp.down_proj (LoRA)",
        "unknown (2): base_model.model.model.layers.0.lora_magnitude_vector (LoRA), model.layers.9.mlp.up_proj (LoRA)",
    ):
        assert part in str(error.value)


def test_no_base_and_no_adapter_weights(tmp_path, base):
    folder, _ = adapter(tmp_path / "lora", base)
    with pytest.raises(UserError, match="--base"):
        from_hf(str(folder), str(tmp_path / "model"), QUIET)
    hf = checkpoint(tmp_path, base)
    with pytest.raises(UserError, match="--base is for LoRA"):
        from_hf(str(hf), str(tmp_path / "model"), QUIET, base=str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors"):
        from_hf(str(folder), str(tmp_path / "model"), QUIET, base=str(hf))
