"""Every intermediate, the logits and the loss against the published implementation."""

import numpy as np
import pytest
from published import intermediate_errors
from support import INFERENCE, TRAINING, golden, relative_error

TOLERANCE = 1e-5


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
def test_loss(assistant, case, scenario):
    """Gradients are compared in tests/train/test_step.py, through the step that trains."""
    expected = golden(case, scenario)
    given = expected["input_ids"], expected["attention_mask"], expected["labels"], expected["pixel_values"]
    assert relative_error(assistant(case).loss(*given), expected["loss"][0]) <= TOLERANCE
