"""Counted costs: against the published totals, against what XLA counts in our programs, and as a user sees them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.analysis import costs, flops, report
from lmm_jax.cli import main
from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig, named_sizes
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from lmm_jax.sharding import make_mesh

SIZES = named_sizes()
LLAMA, VICUNA = SIZES["llava-mini-llama-3.1-8b"], SIZES["llava-mini-vicuna-7b"]
LLAMA_HD = dataclasses.replace(LLAMA, compressor=CompressorConfig(8), resolution_ratio=2)
# XLA counts a loop's body once, so loops have one turn: two layers, one of which is scanned. Wide, so that products prevail.
MINI = ModelConfig(
    VisionConfig(256, 768, 2, 8, patch_size=14, image_size=56),
    DecoderConfig(96, 384, 1024, 2, 6, 2, 64),
    CompressorConfig(2),
    prefusion_layers=2,
)


def tera(*question, **how):
    return flops.totals(flops.question(*question, **how))["total"] / 1e12


def test_the_published_program_costs_what_was_published():
    found = {of.name: of.published["total"] / 1e12 for of in report.make("m", VICUNA, 1, flops.PUBLISHED_TEXT).models}
    for name, figures in costs.PUBLISHED.items():
        assert found[name] == pytest.approx(figures[0], abs=0.01), name
    assert found["HD, C=8"] == pytest.approx(costs.PUBLISHED["HD, C=1"][1], abs=0.01)


@pytest.mark.parametrize(
    "config,images,ours,published,again",
    [
        (LLAMA, 1, 1.83, 2.15, 0.71),
        (VICUNA, 1, 1.755, 1.99, 0.66),
        (LLAMA_HD, 1, 7.285, 8.73, 1.56),
        (LLAMA, 60, 73.6, 89.2, 6.14),
    ],
    ids=("llama", "vicuna", "hd", "60 frames"),
)
def test_what_is_saved(config, images, ours, published, again):
    assert tera(config, images, 45) <= ours
    assert tera(config, images, 45, published=True) == pytest.approx(published, rel=3e-3)
    assert tera(config, images, 45, kept=True) <= again


def programs(config, images, text):
    """FLOPs that XLA counts in the programs from pixels to logits."""
    model, side = LlavaMini(config, attention="plain"), config.vision.image_size
    params = abstract_params(config, make_mesh())

    def count(method, *shapes, **more):
        program = jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method, **more))
        lowered = program.lower(params, *shapes)
        return lowered.cost_analysis()["flops"], lowered.out_info

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    first, prefix = count("encode_image", array(images, config.tiles, side, side, 3))
    width, length = config.decoder.hidden_size, images * config.tokens_per_image + text
    second, _ = count("fuse_text", array(images, text, width), prefix) if config.prefusion_layers else (0.0, None)
    third, _ = count("decode", array(1, length, width), queries=jnp.full((1, 1), length - 1))
    return first + second + third


@pytest.mark.parametrize(
    "config,images",
    [
        (MINI, 1),
        (MINI, 3),
        (dataclasses.replace(MINI, resolution_ratio=2), 1),
        (dataclasses.replace(MINI, compressor=None, prefusion_layers=0), 1),
    ],
    ids=("one", "three", "hd", "v1.5"),
)
def test_as_the_compiler_counts(config, images):
    counted = flops.totals(flops.question(config, images, 48), attention=True)["total"]
    assert programs(config, images, 48) == pytest.approx(counted, rel=0.03)


def test_a_token_costs_as_the_compiler_counts():
    length, d = 64, MINI.decoder
    model, params = LlavaMini(MINI, attention="plain"), abstract_params(MINI, make_mesh())
    from lmm_jax.models import kv_cache

    cache = jax.eval_shape(lambda: kv_cache.empty(d, 1, length, jnp.float32))
    x, at = jax.ShapeDtypeStruct((1, 1, d.hidden_size), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(lambda p, x, c, at: model.apply({"params": p}, x, cache=c, write_at=at, method="decode"))
    counted = flops.totals(flops.token(MINI, length), attention=True)["total"]
    assert step.lower(params, x, cache, at).cost_analysis()["flops"] == pytest.approx(counted, rel=0.05)


def test_the_command(capsys, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("md", "json", "png")}
    options = ["--markdown", files["md"], "--json", files["json"], "--plot", files["png"]]
    assert main(["report", *map(str, options)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out == files["md"].read_text() and files["png"].read_bytes()[1:4] == b"PNG"
    row = next(line for line in out.splitlines() if line.startswith("| C=1 "))
    assert row.split("|")[-3:-1] == ["              1.96 ", "             1.96 "]
    figures = json.loads(files["json"].read_text())
    assert figures["models"][0]["published"]["total"] == pytest.approx(8.55e12, rel=1e-3)
    assert figures["parameters"]["LLaVA-v1.5"] == pytest.approx(7.05e9, rel=1e-3)  # without the last block of the encoder


@pytest.mark.slow
def test_the_command_on_a_model_folder(capsys, tiny, monkeypatch, tmp_path):
    variants, file = costs.variants, tmp_path / "report.json"
    monkeypatch.setattr(costs, "variants", lambda config: variants(config)[:2])
    words = ["--text", "20", "--images", "2", "--dtype", "float32", "--measure", "--json", file, "--plot", tmp_path / "r.svg"]
    assert main(["report", str(tiny("tiny")), *map(str, words)]) == 0
    out, _ = capsys.readouterr()
    assert "20 tokens of text" in out and "published figure" not in out
    figures = json.loads(file.read_text())
    for timed, counted in zip(figures["measured"], figures["models"]):
        assert timed["parts"].keys() == counted["ours"].keys() - {"total"} and all(s > 0 for s in timed["parts"].values())
        assert timed["name"] == counted["name"] and min(timed["first"], timed["again"]) > 0 and timed["token"] >= 0
        assert timed["memory"] > 4 * figures["parameters"][timed["name"]]
        assert f"{1e3 * timed['first']:,.2f} |" in out


@pytest.mark.parametrize("words,told", [(["nothing"], "llava-mini-vicuna-7b"), (["--text", "0"], "at least 1")])
def test_bad_arguments(capsys, words, told):
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and told in err
