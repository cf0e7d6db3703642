"""Dequantisation of every ggml type, against gguf-py and against blocks worked out by hand."""

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize as oracle

from jaxserve.loading import gguf_quant
from jaxserve.loading.gguf_quant import GGML_TYPES, TYPE_BY_NAME, UNSUPPORTED_TYPES, dequantize

# byte offsets of the float16 fields of a block: random bytes there could be NaN, which compares unequal
HALF_OFFSETS = {
    "F32": [],
    "F16": [0],
    "BF16": [],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(name: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    """u8[num_blocks * block bytes]: random, with finite scales of many sizes and both signs."""
    rng = np.random.default_rng(seed)
    if name == "F32":
        return rng.normal(size=num_blocks).astype(np.float32).view(np.uint8)
    if name == "BF16":
        return rng.normal(size=num_blocks).astype(ml_dtypes.bfloat16).view(np.uint8)
    blocks = rng.integers(0, 256, (num_blocks, TYPE_BY_NAME[name].block_bytes), dtype=np.uint8)
    for offset in HALF_OFFSETS[name]:
        scales = (rng.normal(size=num_blocks) * 10.0 ** rng.integers(-6, 3, num_blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def test_every_supported_type_is_tested() -> None:
    assert set(HALF_OFFSETS) == set(TYPE_BY_NAME)


def test_type_table_agrees_with_gguf_py() -> None:
    for code, ggml_type in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(code).name == ggml_type.name
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)]
        assert sizes == (ggml_type.block_values, ggml_type.block_bytes)
    assert {member.value for member in gguf.GGMLQuantizationType} <= set(GGML_TYPES) | set(UNSUPPORTED_TYPES)
    assert not set(GGML_TYPES) & set(UNSUPPORTED_TYPES)


@pytest.mark.parametrize("name", HALF_OFFSETS)
def test_values_equal_gguf_py_bit_for_bit(name: str) -> None:
    raw = random_blocks(name, 257)
    expected = oracle(raw, gguf.GGMLQuantizationType[name])
    ours = dequantize(raw, TYPE_BY_NAME[name])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), expected.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("name", HALF_OFFSETS)
def test_chunks_do_not_change_the_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks(name, 41)
    whole = dequantize(raw, TYPE_BY_NAME[name])
    monkeypatch.setattr(gguf_quant, "CHUNK_VALUES", 3 * TYPE_BY_NAME[name].block_values)
    np.testing.assert_array_equal(dequantize(raw, TYPE_BY_NAME[name]), whole)


def test_q4_1_block_worked_by_hand() -> None:
    head = np.array([0.5, -1.0], np.float16).view(np.uint8)  # scale, minimum
    nibbles = np.array([0x10 * high + low for low, high in zip(range(16), range(15, -1, -1), strict=True)], np.uint8)
    expected = [0.5 * q - 1.0 for q in [*range(16), *range(15, -1, -1)]]
    np.testing.assert_array_equal(dequantize(np.concatenate([head, nibbles]), TYPE_BY_NAME["Q4_1"]), expected)


def test_q8_0_block_worked_by_hand() -> None:
    head = np.array([0.25], np.float16).view(np.uint8)
    values = np.arange(-16, 16, dtype=np.int8)
    raw = np.concatenate([head, values.view(np.uint8)])
    np.testing.assert_array_equal(dequantize(raw, TYPE_BY_NAME["Q8_0"]), values * 0.25)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "BF16"])
def test_peak_memory_is_the_output_and_a_few_chunks(name: str) -> None:
    ggml_type = TYPE_BY_NAME[name]
    num_values = 1 << 23  # 32 MiB of float32
    raw = np.zeros(num_values // ggml_type.block_values * ggml_type.block_bytes, np.uint8)
    tracemalloc.start()
    dequantize(raw, ggml_type)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < num_values * 4 + (8 << 20)


def test_bytes_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole 20-byte Q4_1 blocks"):
        dequantize(np.zeros(21, np.uint8), TYPE_BY_NAME["Q4_1"])
