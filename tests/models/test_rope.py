"""Rotary frequencies equal transformers' for every kind, and rotation is what its definition says."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import ROPE_KINDS
from jaxserve.models.hf_config import rope_config
from jaxserve.models.rope import inverse_frequencies, rope_table
from pallas_kernels.kv_update.rope import rotate

KINDS = {
    "default": [{}],
    "linear": [{"factor": 4.0}],
    "dynamic": [{"factor": 2.0}, {"factor": 8.0}],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 32768},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 64.0, "beta_slow": 2.0},
        {"factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.3, "truncate": False},
        {"factor": 2.0, "original_max_position_embeddings": 4},
    ],
}
CASES = [(kind, values) for kind, variants in KINDS.items() for values in variants]


def test_every_kind_is_tested():
    assert set(KINDS) == set(ROPE_KINDS)


@pytest.mark.parametrize("kind, values", CASES)
@pytest.mark.parametrize("theta, head_dim", [(10_000.0, 64), (1_000_000.0, 128)])
def test_frequencies_equal_transformers(kind, values, theta, head_dim):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": theta, **values}
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=8192, rope_parameters=dict(parameters), num_attention_heads=4
    )
    init = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    for max_model_len in (100, 8192, 20_000):
        expected, expected_factor = init(config, seq_len=max_model_len)
        rope = rope_config({"rope_parameters": parameters}, 8192, head_dim)
        inverse, factor = inverse_frequencies(rope, head_dim, max_model_len)
        assert inverse.dtype == np.float32 and inverse.shape == (head_dim // 2,)
        np.testing.assert_allclose(inverse, expected.numpy(), rtol=2e-6)
        assert factor == pytest.approx(expected_factor, rel=1e-9)


@pytest.mark.parametrize("kind, values", CASES)
def test_both_spellings_of_config_give_the_same_rope(kind, values):
    new = rope_config({"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **values}}, 8192, 64)
    old = rope_config({"rope_theta": 5e5, "rope_scaling": {"type": kind, **values}}, 8192, 64)
    assert old == new
    assert new.theta == 5e5 and new.kind == kind


def test_a_rotation_depends_on_relative_position_only():
    rng = np.random.default_rng(0)
    rope = rope_config({}, 8192, 8)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        rotated = [rotate(x, *rope_table(rope, 8, jnp.array([p]), 8192)) for x, p in ((q, q_position), (k, k_position))]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(13, 4) == pytest.approx(score(113, 104), abs=1e-4)
    assert abs(score(13, 4) - score(13, 5)) > 1e-2


def test_angles_of_far_positions_keep_float32_accuracy():
    rope = rope_config({}, 131_072, 64)
    inverse, _ = inverse_frequencies(rope, 64, 131_072)
    positions = np.array([0, 1, 4095, 131_071], np.int32)
    cos, sin = rope_table(rope, 64, jnp.asarray(positions), 131_072)
    angles = (positions.astype(np.float32)[:, None] * inverse).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)
