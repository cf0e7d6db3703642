"""A small model's dimensions, without weights or an engine."""

from collections.abc import Callable

import pytest

from jaxserve.models.registry import model_config
from jaxserve.quant.scheme import UNQUANTISED
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.dimensions import Dimensions
from jaxserve.scheduling.sequence import Sequence
from pallas_kernels import dispatch

VOCAB = 70
TARGETS = {"cpu": dispatch.Target("cpu"), "gpu": dispatch.Target("gpu", "NVIDIA H200", (9, 0), 132)}
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture
def dimensions() -> Callable[..., Dimensions]:
    """dimensions(**changes): of a Llama of one layer and 70 tokens, in a pool of 64 pages."""

    def make(**changes: object) -> Dimensions:
        sizes: dict = dict(
            dtype="float32", platform="cpu", num_pages=64, page_size=8, max_num_seqs=4, max_model_len=64, max_logprobs=3
        )
        sizes.update(changes)
        sizes = {"kv_dtype": sizes["dtype"], "quantisation": UNQUANTISED, **sizes}
        model = model_config(HF_CONFIG)
        shape = model.attention_shape(sizes["page_size"], sizes["dtype"], sizes["kv_dtype"])
        kernels = dispatch.choose(TARGETS[sizes["platform"]], shape)
        return Dimensions(model=model, kernels=kernels, **sizes)

    return make


@pytest.fixture
def make_sequence() -> Callable[..., Sequence]:
    """make_sequence(prompt, generated, *, slot, index, bad_words, **sampling): one that runs in a slot."""

    def make(
        prompt: list[int],
        generated: tuple[int, ...] | list[int] = (),
        *,
        slot: int = 0,
        index: int = 0,
        bad_words: tuple[tuple[int, ...], ...] = (),
        **sampling: object,
    ) -> Sequence:
        params = SamplingParams(**{"seed": 1, **sampling})  # type: ignore[arg-type]
        request = Request(
            id="r", prompt_token_ids=prompt, params=params, eos_token_ids=(7,), bad_word_token_ids=bad_words
        )
        sequence = Sequence(request, index, (0, index), 1000, None)
        sequence.tokens += generated
        sequence.slot = slot
        return sequence

    return make
