"""Which kernels are measured at which shapes, in order of what they tell."""

from collections.abc import Iterator

from gpu.attention_cases import Model, decode_case, mixed_case, prefill_case
from gpu.case import Case
from gpu.grouped_cases import adapter_case, expert_case
from gpu.matmul_cases import plain_case, quant_case
from gpu.sampling_cases import KINDS, sampling_case
from gpu.update_cases import update_case

ROWS = (1, 8, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192)
MOST_TOKENS = 64 * 8192  # of a decode step of Llama-3-8B: 2 GiB of keys and values a layer
TRITON = ("triton",)
BOTH = ("reference", "triton")
ALL = ("reference", "triton", "mosaic")
EXPERTS = (4096, 14336, 8, 2)  # Mixtral: inputs, outputs, experts, of which a token takes
ADAPTERS = (4096, 4096, 16, 8)  # inputs, outputs, rank, adapters in a batch
SCHEMES = ("int8", "int4", "fp8", "fp8_dynamic")


def all_cases(*, tiny: bool, quick: bool) -> list[Case]:
    """tiny: a case of each kind at shapes for a CPU. quick: only the sizes that the goals name."""
    return list(_tiny() if tiny else _quick() if quick else _full())


def _tiny() -> Iterator[Case]:
    model, eight_bits = Model("tiny", "float32", "float32"), Model("tiny", "float32", "float8_e4m3fn")
    yield decode_case(model, 2, 40, BOTH)
    yield decode_case(eight_bits, 2, 40, BOTH)
    yield prefill_case(model, 24, BOTH)
    yield mixed_case(model, 2, 40, 20, ALL)
    yield update_case(model, 3, BOTH)
    yield sampling_case(2, 512, "top-p 0.9", BOTH)
    yield expert_case(3, 64, 32, 4, 2, "float32", BOTH)
    yield adapter_case(3, 64, 32, 8, 2, "float32", BOTH)
    yield plain_case(2, 64, 64, "float32")
    for scheme in SCHEMES:
        yield quant_case(2, 64, 64, scheme, "float32", BOTH)


def _quick() -> Iterator[Case]:
    small, large = Model("Llama-3-8B", "bfloat16", "bfloat16"), Model("Llama-2-13B", "bfloat16", "bfloat16")
    yield decode_case(small, 64, 2048, BOTH)
    yield decode_case(large, 64, 2048, TRITON)
    yield decode_case(Model("Llama-3-8B", "bfloat16", "float8_e4m3fn"), 64, 2048, BOTH)
    yield prefill_case(small, 2048, ALL)
    yield mixed_case(small, 64, 2048, 512, ALL)
    yield update_case(small, 64, BOTH)
    for kind in KINDS:
        yield sampling_case(64, 128256, kind, BOTH)
    yield plain_case(16, 4096, 28672, "bfloat16")
    for scheme in SCHEMES:
        yield quant_case(16, 4096, 28672, scheme, "bfloat16", BOTH)


def _full() -> Iterator[Case]:
    small, large = Model("Llama-3-8B", "bfloat16", "bfloat16"), Model("Llama-2-13B", "bfloat16", "bfloat16")
    eight_bits = Model("Llama-3-8B", "bfloat16", "float8_e4m3fn")
    named = {case.name for case in _quick()}
    yield from _quick()
    yield from (case for case in _others(small, large, eight_bits) if case.name not in named)


def _others(small: Model, large: Model, eight_bits: Model) -> Iterator[Case]:
    """What the goals do not name; the cases that they do name come again."""
    for tokens in (512, 8192):
        yield prefill_case(small, tokens, ALL[1:])
    yield prefill_case(large, 2048, ALL[1:])
    for context in CONTEXTS:
        for rows in ROWS:
            if rows * context <= MOST_TOKENS:
                yield decode_case(small, rows, context, TRITON)
    for tokens in (1, 16, 64, 1024):
        yield expert_case(tokens, *EXPERTS, "bfloat16", BOTH)
    for tokens in (16, 256, 2048):
        yield adapter_case(tokens, *ADAPTERS, "bfloat16", BOTH)
    for tokens in (1, 64, 512):
        yield plain_case(tokens, 4096, 28672, "bfloat16")
        for scheme in SCHEMES:
            yield quant_case(tokens, 4096, 28672, scheme, "bfloat16", BOTH)
    for rows in (1, 256):
        for kind in KINDS:
            yield sampling_case(rows, 128256, kind, TRITON)
    yield update_case(small, 8192, BOTH)
    yield update_case(eight_bits, 64, TRITON)
    for rows, context in ((8, 2048), (256, 512), (64, 8192)):
        yield decode_case(eight_bits, rows, context, TRITON)
    for rows, context in ((1, 2048), (8, 8192), (256, 512)):
        yield decode_case(large, rows, context, TRITON)
