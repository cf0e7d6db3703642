"""The least a piece of work must move and compute, and what share of the card's measured ceilings a time means.

Bytes: every input read once, every output written once. Operations: two a multiply-add. Imports no JAX.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What the card was measured to do."""

    copy_gb_s: float  # 1e9 bytes a second, read and written ones counted
    matmul_tflop_s: float  # bf16, 8192^3


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int


@dataclass(frozen=True)
class ModelSize:
    """What of a decoder's sizes decides its bytes and operations; weights of 16 bits."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> "ModelSize":
        """From the keys of a config.json."""
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices, a token's multiply-adds in them."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Of the matrix that makes logits."""
        return self.hidden_size * self.vocab_size

    def kv_bytes(self, item_bytes: int) -> int:
        """Of one token in all layers."""
        scales = 4 if item_bytes == 1 else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * item_bytes + scales)


def decode_attention(
    contexts: list[int], *, num_heads: int, num_kv_heads: int, head_dim: int, kv_item_bytes: int, item_bytes: int
) -> Work:
    """One token a row over its context: the keys and values, the query, the result."""
    tokens = sum(contexts)
    scales = 4 if kv_item_bytes == 1 else 0
    kv = 2 * tokens * num_kv_heads * (head_dim * kv_item_bytes + scales)
    ends = 2 * len(contexts) * num_heads * head_dim * item_bytes
    return Work(kv + ends, 4 * tokens * num_heads * head_dim)


def mixed_attention(
    rows: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_item_bytes: int,
    item_bytes: int,
) -> Work:
    """Causal attention of rows of (query tokens, context they end): masked scores are not counted."""
    queries = sum(count for count, _ in rows)
    # The i-th of a row's n queries sees context - n + i keys.
    seen = sum(count * context - count * (count - 1) // 2 for count, context in rows)
    kv = 2 * sum(context for _, context in rows) * num_kv_heads * head_dim * kv_item_bytes
    return Work(kv + 2 * queries * num_heads * head_dim * item_bytes, 4 * seen * num_heads * head_dim)


def matmul(tokens: int, inputs: int, outputs: int, *, weight_bits: float, item_bytes: int) -> Work:
    """x[tokens, inputs] @ w[inputs, outputs]; weight_bits: of one weight, its share of the scales included."""
    weights = int(inputs * outputs * weight_bits / 8)
    return Work(weights + tokens * (inputs + outputs) * item_bytes, 2 * tokens * inputs * outputs)


def decode_step(size: ModelSize, contexts: list[int], *, kv_item_bytes: int, item_bytes: int = 2) -> Work:
    """A whole decode step: every weight but the embeddings not looked up, and all keys and values. No activations."""
    rows, tokens = len(contexts), sum(contexts)
    weights = (size.layer_weights + size.head_weights) * item_bytes
    flops = 2 * rows * (size.layer_weights + size.head_weights)
    return Work(
        weights + tokens * size.kv_bytes(kv_item_bytes),
        flops + 4 * tokens * size.num_layers * size.num_heads * size.head_dim,
    )


def prefill_step(size: ModelSize, tokens: int, *, item_bytes: int = 2) -> Work:
    """One prompt from its start: logits of its last token, causal attention without the masked half."""
    attention = 4 * size.num_layers * size.num_heads * size.head_dim * (tokens * (tokens + 1) // 2)
    flops = 2 * tokens * size.layer_weights + 2 * size.head_weights + attention
    weights = (size.layer_weights + size.head_weights) * item_bytes
    return Work(weights + tokens * size.kv_bytes(item_bytes), flops)


def shares(work: Work, us: float, ceilings: Ceilings) -> dict[str, float]:
    """GB/s, TFLOP/s, and percent: of the copy ceiling, of the matmul ceiling, of the roofline (the nearer of both)."""
    gb_s = work.bytes / us / 1e3
    tflop_s = work.flops / us / 1e6
    memory = 100 * gb_s / ceilings.copy_gb_s
    arithmetic = 100 * tflop_s / ceilings.matmul_tflop_s
    return {
        "gb_s": round(gb_s, 2),
        "copy_percent": round(memory, 2),
        "tflop_s": round(tflop_s, 3),
        "matmul_percent": round(arithmetic, 2),
        "roofline_percent": round(max(memory, arithmetic), 2),
    }
