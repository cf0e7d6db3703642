"""Every supported family, served: tiny random checkpoints written by transformers, greedy tokens and prompt logprobs
equal to its own `generate` and log_softmax on torch, in float32.

Prompts are longer than a step, than a window and than a page, so chunks, windows and pages meet here.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxserve
from jaxserve import SamplingParams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
ENGINE: dict[str, Any] = dict(
    max_num_seqs=2,
    max_num_batched_tokens=32,
    max_model_len=160,
    page_size=8,
    num_pages=49,
    max_logprobs=0,  # the chosen token alone: nothing to sort, so it compiles sooner
    dtype="float32",
    show_progress=False,
)
LENGTHS = (5, 33, 90)  # within a page, over a step, over every window and three steps
NEW_TOKENS = 24
TOLERANCE = 1e-3  # of a log probability


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **values}


def case(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**SIZES, **options})


CASES: dict[str, Callable[[], Any]] = {
    "llama_grouped_llama3": case(
        "LlamaConfig",
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "llama_multi_head_linear_tied": case(
        "LlamaConfig", num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=rope("linear", factor=2.0)
    ),
    "llama_multi_query_yarn": case(
        "LlamaConfig",
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    # transformers scales by the longest sequence so far; up to the original context the two agree
    "llama_biases_dynamic": case(
        "LlamaConfig", attention_bias=True, mlp_bias=True, rope_parameters=rope("dynamic", factor=2.0)
    ),
    "mistral_window": case("MistralConfig", sliding_window=24, head_dim=20),
    "qwen2_tied_upper_layers_window": case(
        "Qwen2Config", use_sliding_window=True, sliding_window=20, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3_tied_wide_heads": case("Qwen3Config", head_dim=24, tie_word_embeddings=True),
    "qwen3_group_of_3_window": case(
        "Qwen3Config",
        num_attention_heads=6,
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    ),
}


def save(config: Any, directory: Path, tokenizer_from: Path) -> Any:
    """A random model of `config`, norms and biases random too, written to `directory` with a tokenizer; the model."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    model.generation_config = transformers.GenerationConfig(pad_token_id=1)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, directory)
    return model


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, SIZES["vocab_size"], length).tolist() for length in LENGTHS]


def hf_greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return whole[0, len(prompt) :].tolist()


def hf_prompt_logprobs(model: Any, prompt: list[int]) -> np.ndarray:
    """f32[len(prompt) - 1] of every prompt token but the first."""
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], dim=-1)
    return logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", CASES)
def test_served_tokens_and_prompt_logprobs_equal_transformers(name, tiny_model, tmp_path, xla_cache):
    model = save(CASES[name](), tmp_path, tiny_model)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0)
    with jaxserve.LLM(tmp_path, compilation_cache_dir=str(xla_cache), **ENGINE) as llm:
        outputs = llm.generate(prompts(), params)
    expected = [hf_greedy(model, prompt) for prompt in prompts()]
    assert len({token for tokens in expected for token in tokens}) > 12, "a model that repeats itself shows little"
    assert [output.outputs[0].token_ids for output in outputs] == expected
    ours = [
        entry[token].logprob
        for prompt, output in zip(prompts(), outputs, strict=True)
        for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    theirs = np.concatenate([hf_prompt_logprobs(model, prompt) for prompt in prompts()])
    assert theirs.std() > 0.5, "log probabilities that are all alike show little"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_the_prompts_reach_what_is_compared():
    """Over the windows, over a step, within the original context of the dynamic rope."""
    assert max(LENGTHS) > 2 * ENGINE["max_num_batched_tokens"] and min(LENGTHS) < ENGINE["page_size"]
    longest = max(LENGTHS) + NEW_TOKENS
    assert longest <= ENGINE["max_model_len"] <= SIZES["max_position_embeddings"]
    windows = [CASES[name]().sliding_window for name in CASES if name.endswith("window")]
    assert len(windows) == 3 and max(windows) < max(LENGTHS)
