"""config.json becomes the ModelConfig it describes, or an error that names key and value."""

import dataclasses

import pytest

from jaxserve.errors import CorruptFileError, UnsupportedModelError
from jaxserve.models.blocks import ACTIVATIONS
from jaxserve.models.config import HIDDEN_ACTS
from jaxserve.models.registry import FAMILIES, model_config

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], **SIZES}
MISTRAL = {"architectures": ["MistralForCausalLM"], **SIZES}


def test_missing_optional_keys_take_the_familys_defaults():
    llama, qwen3 = model_config(LLAMA), model_config({**SIZES, "architectures": ["Qwen3ForCausalLM"]})
    assert (llama.head_dim, llama.norm_eps, llama.hidden_act, llama.windows) == (16, 1e-6, "silu", (0, 0, 0))
    assert (llama.qkv_bias, llama.qk_norm, llama.tie_word_embeddings, llama.eos_token_ids) == (False, False, False, ())
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    assert model_config({**LLAMA, "num_key_value_heads": None}).num_kv_heads == 4
    assert model_config(QWEN2).qkv_bias and not model_config(QWEN2).output_bias
    assert model_config(MISTRAL).windows == (4096,) * 3
    assert model_config({**LLAMA, "attention_bias": True}).output_bias


def test_a_config_is_a_valid_static_argument():
    config = model_config({**LLAMA, "eos_token_id": [1, 2]})
    assert hash(config) == hash(model_config({**LLAMA, "eos_token_id": [1, 2]}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1


def test_generation_config_replaces_the_end_of_sequence_tokens():
    hf = {**LLAMA, "eos_token_id": 2, "bos_token_id": 1}
    assert model_config(hf).eos_token_ids == (2,)
    assert model_config(hf, {}).eos_token_ids == (2,)
    assert model_config(hf, {"eos_token_id": [3, 4]}).eos_token_ids == (3, 4)
    assert model_config(hf).bos_token_id == 1


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, (0, 0, 0)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, (0, 0, 0)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, 0, 8),
        ),
    ],
)
def test_qwen_windows_follow_layer_types_then_max_window_layers(keys, windows):
    assert model_config({**QWEN2, **keys}).windows == windows


@pytest.mark.parametrize(
    "keys, error, says",
    [
        ({"vocab_size": None}, CorruptFileError, "vocab_size is missing"),
        ({"vocab_size": "100"}, CorruptFileError, "vocab_size='100'"),
        ({"hidden_size": True}, CorruptFileError, "hidden_size=True"),
        ({"hidden_size": 0}, CorruptFileError, "hidden_size=0"),
        ({"hidden_size": 66}, CorruptFileError, "hidden_size=66"),
        ({"num_hidden_layers": 10**9}, CorruptFileError, "num_hidden_layers=1000000000"),
        ({"num_key_value_heads": 3}, CorruptFileError, "num_key_value_heads=3"),
        ({"head_dim": 7}, UnsupportedModelError, "head_dim=7"),
        ({"rms_norm_eps": float("nan")}, CorruptFileError, "rms_norm_eps=nan"),
        ({"hidden_act": "swish2"}, UnsupportedModelError, "hidden_act='swish2'"),
        ({"hidden_act": ["silu"]}, UnsupportedModelError, "hidden_act=['silu']"),
        ({"tie_word_embeddings": "yes"}, CorruptFileError, "tie_word_embeddings='yes'"),
        ({"eos_token_id": 100}, CorruptFileError, "eos_token_id=100"),
        ({"eos_token_id": [1, -1]}, CorruptFileError, "eos_token_id=[1, -1]"),
        ({"max_position_embeddings": -1}, CorruptFileError, "max_position_embeddings=-1"),
        ({"rope_theta": 0}, CorruptFileError, "rope_theta=0"),
        ({"rope_theta": float("inf")}, CorruptFileError, "rope_theta=inf"),
        ({"rope_scaling": "linear"}, CorruptFileError, "rope_scaling='linear'"),
        ({"rope_scaling": {"type": "linear"}}, CorruptFileError, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, CorruptFileError, "factor=0.5"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModelError, "rope_type='longrope'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, UnsupportedModelError, "rope_type=['linear']"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, CorruptFileError, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            CorruptFileError,
            "high_freq_factor=4",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": 0.5}}, CorruptFileError, "beta_fast=0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8}, "head_dim": 2}, UnsupportedModelError, "head_dim=2"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, UnsupportedModelError, "rope_parameters="),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "'gptq'"),
        ({"architectures": []}, CorruptFileError, "architectures=[]"),
        ({"architectures": None}, CorruptFileError, "architectures=None"),
    ],
)
def test_an_invalid_value_is_refused_by_key_and_value(keys, error, says):
    with pytest.raises(error) as caught:
        model_config({**LLAMA, **keys})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, error, says",
    [
        ({"layer_types": ["full_attention"]}, CorruptFileError, "layer_types="),
        ({"layer_types": ["chunked_attention"] * 3}, UnsupportedModelError, "layer_types='chunked_attention'"),
        ({"layer_types": ["sliding_attention"] * 3}, CorruptFileError, "layer_types='sliding_attention'"),
        ({"use_sliding_window": True, "sliding_window": 0}, CorruptFileError, "sliding_window=0"),
        ({"use_sliding_window": 1}, CorruptFileError, "use_sliding_window=1"),
    ],
)
def test_an_invalid_window_is_refused_by_key_and_value(keys, error, says):
    with pytest.raises(error, match=says):
        model_config({**QWEN2, **keys})


def test_mistral_with_layers_of_two_kinds_is_refused():
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        model_config({**MISTRAL, "layer_types": ["sliding_attention", "full_attention", "full_attention"]})


def test_an_unsupported_architecture_names_itself_the_nearest_and_all():
    with pytest.raises(UnsupportedModelError) as caught:
        model_config({**LLAMA, "architectures": ["Qwen2MoeForCausalLM"]})
    message = str(caught.value)
    assert "'Qwen2MoeForCausalLM'" in message and "nearest supported one is Qwen2ForCausalLM" in message
    assert all(name in message for name in FAMILIES)
    assert "never run" not in message


def test_remote_code_is_never_run_and_the_message_says_so():
    hf = {**LLAMA, "architectures": ["EvilModel"], "auto_map": {"AutoModelForCausalLM": "evil.EvilModel"}}
    with pytest.raises(UnsupportedModelError, match="auto_map.*never run"):
        model_config(hf)


def test_every_accepted_activation_has_a_function():
    assert set(ACTIVATIONS) == set(HIDDEN_ACTS)
