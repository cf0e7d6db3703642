"""ggml tensor types: raw bytes in, float32 values out.

One table, `GGML_TYPES`, holds for every type that jaxserve reads: values in a block, bytes in a block, and the function
that turns blocks into values. The layouts are those that ggml publishes (`ggml-common.h`): the `_0` types store
`d * q`, the `_1` types `d * q + m`, the K types split 256 values into groups whose scales are themselves quantised.
Axes: N blocks, B bytes a block, V values a block. All scales are little-endian float16.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

CHUNK_VALUES = 1 << 18  # values dequantised at a time: temporaries stay near 5 MiB whatever the tensor's size

Dequantize = Callable[[np.ndarray], np.ndarray]  # u8[N, B] -> f32[N, V]


class GGMLType(NamedTuple):
    """A ggml tensor type. `native` is the dtype of a type that stores plain floats, else None."""

    name: str
    block_values: int
    block_bytes: int
    dequantize: Dequantize
    native: np.dtype | None = None


def dequantize(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """u8[bytes] whole blocks of `ggml_type` -> f32[values], exact for F32, F16 and BF16.

    Peak memory is the output and a few chunks of `CHUNK_VALUES`. Raises ValueError if `raw` is not whole blocks.
    """
    if raw.dtype != np.uint8 or raw.size % ggml_type.block_bytes:
        raise ValueError(f"{raw.size} x {raw.dtype} are not whole {ggml_type.block_bytes}-byte {ggml_type.name} blocks")
    blocks = raw.reshape(-1, ggml_type.block_bytes)
    out = np.empty((len(blocks), ggml_type.block_values), np.float32)
    step = max(1, CHUNK_VALUES // ggml_type.block_values)
    for start in range(0, len(blocks), step):
        out[start : start + step] = ggml_type.dequantize(blocks[start : start + step])
    return out.reshape(-1)


def _float(dtype: np.dtype) -> Dequantize:
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype).astype(np.float32)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, as f32[N, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """u8[..., n] -> u8[..., 2 n]: all low nibbles, then all high nibbles."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bit_planes(packed: np.ndarray, bits: int) -> np.ndarray:
    """u8[..., n] -> u8[..., 8 / bits, n]: plane i holds the i-th lowest `bits`-wide field of every byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """u8[N, 4] one fifth bit a value, u8[N, 16] nibbles -> f32[N, 32] in 0..31."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return (_nibbles(low) | (fifth << 4)).astype(np.float32)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - np.float32(16)) * _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return _five_bits(blocks[:, 4:8], blocks[:, 8:]) * _half(blocks, 0) + _half(blocks, 2)


def _grouped(scales: np.ndarray, q: np.ndarray, mins: np.ndarray | None = None) -> np.ndarray:
    """f32[N, g] scales and minima of g groups, q[N, 256] -> f32[N, 256]: scale * q - min."""
    values = q.reshape(len(q), scales.shape[1], -1).astype(np.float32) * scales[..., None]
    if mins is not None:
        values -= mins[..., None]
    return values.reshape(len(q), -1)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, :16]  # 16 groups of 16: low nibble scale, high nibble minimum
    q = _bit_planes(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    mins = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _grouped(scales, q, mins)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    third = _bit_planes(blocks[:, :32], 1).reshape(-1, 256)
    q = _bit_planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    # 16 six-bit scales: nibbles in bytes 0..7, their upper two bits in planes of bytes 8..11
    upper = _bit_planes(blocks[:, 104:108], 2).reshape(-1, 16)
    scales = (_nibbles(blocks[:, 96:104]) | (upper << 4)).astype(np.float32) - np.float32(32)
    # the mask bit means "no offset": q is 0..3 where it is set and -4..-1 where it is not
    signed = q.astype(np.int8) - ((third ^ 1) << 2).astype(np.int8)
    return _grouped(_half(blocks, 108) * scales, signed)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u8[N, 12] -> (scales, minima), each f32[N, 8] in 0..63, as Q4_K and Q5_K pack them.

    Groups 0..3 sit in the low six bits of bytes 0..3 and 4..7; groups 4..7 have their low four bits in bytes 8..11
    and their upper two in the top bits that bytes 0..7 left free.
    """
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (last & 15) | ((first >> 6) << 4)], axis=1)
    mins = np.concatenate([second & 63, (last >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    q = _bit_planes(blocks[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 256)
    return _grouped(_half(blocks, 0) * scales, q, _half(blocks, 2) * mins)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    fifth = _bit_planes(blocks[:, 16:48], 1).reshape(-1, 256)
    q = _bit_planes(blocks[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 256) | (fifth << 4)
    return _grouped(_half(blocks, 0) * scales, q, _half(blocks, 2) * mins)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _bit_planes(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    upper = _bit_planes(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    signed = (low | (upper << 4)).astype(np.int8) - np.int8(32)
    return _grouped(_half(blocks, 208) * scales, signed)


_F32, _F16, _BF16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)

GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, _float(_F32), _F32),
    1: GGMLType("F16", 1, 2, _float(_F16), _F16),
    2: GGMLType("Q4_0", 32, 18, _q4_0),
    3: GGMLType("Q4_1", 32, 20, _q4_1),
    6: GGMLType("Q5_0", 32, 22, _q5_0),
    7: GGMLType("Q5_1", 32, 24, _q5_1),
    8: GGMLType("Q8_0", 32, 34, _q8_0),
    10: GGMLType("Q2_K", 256, 84, _q2_k),
    11: GGMLType("Q3_K", 256, 110, _q3_k),
    12: GGMLType("Q4_K", 256, 144, _q4_k),
    13: GGMLType("Q5_K", 256, 176, _q5_k),
    14: GGMLType("Q6_K", 256, 210, _q6_k),
    30: GGMLType("BF16", 1, 2, _float(_BF16), _BF16),
}

TYPE_BY_NAME: dict[str, GGMLType] = {ggml_type.name: ggml_type for ggml_type in GGML_TYPES.values()}

# types ggml defines, or once defined, that jaxserve does not read: an unsupported model, not a corrupt file
UNSUPPORTED_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
