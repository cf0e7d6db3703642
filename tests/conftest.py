"""A tiny random Llama with a tokenizer of its own, and engines on it that tests share."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import settings

import jaxserve

# No deadlines: machines are busy. In CI the examples are the same on every run, elsewhere they explore.
settings.register_profile("jaxserve", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("jaxserve")

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_pages": 129,
    "page_size": 8,
    "max_model_len": 256,
    "dtype": "float32",
    "show_progress": False,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Engines of the tests run on these; on a CPU a kernel then runs interpreted."""
    for option in ("--attention-backend", "--sampling-backend"):
        parser.addoption(option, default="auto", help="of every engine that does not name its own")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 2 layers, 4 heads on 2 KV heads, 512 tokens; logits far enough apart to be compared."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["The quick brown fox jumps over the lazy dog. Zwei Sätze äöü. 日本語 😀 user assistant system\n"] * 4
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.save(str(directory / "tokenizer.json"))
    tokenizer_config = {"bos_token": special[0], "eos_token": special[1], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    # The random model would otherwise stop wherever it happens to pick token 1.
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 40}))
    return directory


@pytest.fixture(scope="session")
def xla_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, shared by all engines of a test run."""
    return tmp_path_factory.mktemp("xla_cache")


@pytest.fixture(scope="session")
def build_llm(tiny_model: Path, xla_cache: Path, request: pytest.FixtureRequest) -> Callable[..., "jaxserve.LLM"]:
    """build_llm(**options): a new engine with these options over SMALL; the caller closes it."""
    backends = {name: request.config.getoption(name) for name in ("attention_backend", "sampling_backend")}
    defaults = {"model": tiny_model, "compilation_cache_dir": str(xla_cache), **SMALL, **backends}

    def build(**options: Any) -> jaxserve.LLM:
        return jaxserve.LLM(**{**defaults, **options})

    return build


def _engines_live(fixture_name: str, config: pytest.Config) -> Literal["module", "session"]:
    """Interpreted kernels are large programs, each maps memory, and Linux allows a process 65,530 mappings."""
    return "session" if config.getoption("attention_backend") == "auto" else "module"


@pytest.fixture(scope=_engines_live)
def make_llm(build_llm: Callable[..., "jaxserve.LLM"]) -> Iterator[Callable[..., "jaxserve.LLM"]]:
    """make_llm(**options): as build_llm, but equal options give the same engine, and all are closed at the end."""
    made: dict[str, jaxserve.LLM] = {}

    def make(**options: Any) -> jaxserve.LLM:
        key = repr(sorted(options.items(), key=str))
        if key not in made:
            made[key] = build_llm(**options)
        return made[key]

    yield make
    for llm in made.values():
        llm.close()
    made.clear()
    gc.collect()


@pytest.fixture
def new_llm(build_llm: Callable[..., "jaxserve.LLM"]) -> Iterator[Callable[..., "jaxserve.LLM"]]:
    """new_llm(**options): an engine for this test alone."""
    made: list[jaxserve.LLM] = []

    def make(**options: Any) -> jaxserve.LLM:
        made.append(build_llm(**options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def llm(make_llm: Callable[..., "jaxserve.LLM"]) -> "jaxserve.LLM":
    """The engine with default options, its prefix cache empty."""
    engine = make_llm()
    engine.reset_prefix_cache()
    return engine
