"""Every intermediate, the logits and the gradients against the published implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
from published import intermediate_errors, loss_and_gradients, to_hf_names
from support import INFERENCE, TRAINING, golden, gradient_norms, relative_error

from lmm_jax.models.llava_mini import LlavaMini

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.mark.parametrize("case,scenario", INFERENCE)
def test_intermediates(assistant, case, scenario):
    expected = golden(case, scenario)
    errors = intermediate_errors(assistant(case), expected)
    assert all(e <= TOLERANCE for e in errors.values()), errors
    assert set(expected) - {"input_ids", "attention_mask", "pixel_values", "inputs_embeds_mask", "greedy_tokens"} == set(
        errors
    )


@pytest.mark.parametrize("case,scenario", INFERENCE)
def test_logits_and_greedy_tokens(assistant, case, scenario):
    loaded, expected = assistant(case), golden(case, scenario)
    inputs = expected["input_ids"], expected["attention_mask"], expected.get("pixel_values")
    real = expected["inputs_embeds_mask"] > 0
    logits = loaded.logits(*inputs)
    assert logits.shape == expected["logits"].shape
    assert relative_error(logits[real], expected["logits"][real]) <= TOLERANCE
    np.testing.assert_array_equal(loaded.generate(*inputs, max_new_tokens=8), expected["greedy_tokens"])


@pytest.mark.parametrize("case,scenario", TRAINING)
def test_loss_and_gradients(assistant, case, scenario):
    loaded, expected = assistant(case), golden(case, scenario)
    config, model = loaded.config, LlavaMini(loaded.config)
    loss, logits, layout, gradients = loss_and_gradients(model, loaded.engine.params, expected)
    given = expected["input_ids"], expected["attention_mask"], expected["labels"], expected["pixel_values"]
    assert relative_error(loss, expected["loss"][0]) <= TOLERANCE
    assert relative_error(loaded.loss(*given), expected["loss"][0]) <= TOLERANCE
    real = np.arange(logits.shape[1]) < layout.lengths[:, None]
    assert relative_error(logits[real], expected["logits"][real]) <= TOLERANCE

    ours = to_hf_names(config, gradients)
    published = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
    errors = {name: relative_error(ours[name], g) for name, g in published.items()}
    assert all(e <= GRADIENT_TOLERANCE for e in errors.values()), errors
    check_without_gradient(case, scenario, ours, published)


def check_without_gradient(case, scenario, ours, published):
    """The vision encoder is frozen by path in both stages; everything else without a gradient is so by the model."""
    norms = gradient_norms(case, scenario)
    if norms is None:
        return
    without = {name for name, norm in norms.items() if norm is None and "vision_tower" not in name}
    zero = {name for name, g in ours.items() if not jnp.any(g) and "vision_tower" not in name}
    assert without == zero == {"model.embed_tokens.weight", "model.compressor.pos_embed"}
    for name, norm in norms.items():
        if norm is not None:
            assert name in published
            assert np.linalg.norm(ours[name]) == pytest.approx(norm, rel=GRADIENT_TOLERANCE)
