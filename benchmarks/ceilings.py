"""What the card can do: bytes copied a second, and bf16 multiply-adds a second. Every share is of these two.

    python benchmarks/ceilings.py [--out DIR] [--tiny]

copy     y = x + 1 over 4 GiB of int32: read and written, many times the L2
matmul   bf16 8192 x 8192 x 8192 on random numbers, through XLA's own choice of library
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
from gpu import rows, timing
from gpu.case import noise
from gpu.roofline import Ceilings
from report import RESULTS

PART = "ceilings"
SAMPLES = 20


def measure(file: rows.RowFile, *, tiny: bool) -> Ceilings:
    """Measures both, writes their rows. tiny: at sizes that a CPU is done with at once, which tell nothing."""
    items, side = (1 << 20, 256) if tiny else (1 << 30, 8192)
    seconds = 0.0 if tiny else 0.02
    x = jax.random.randint(jax.random.key(0, impl="rbg"), (items,), 0, 1 << 20, jnp.int32)
    copy, compile_seconds = timing.compiled(lambda x: x + 1, x, donate=(0,))
    copied, x = timing.measure(copy, x, calls=1, samples=SAMPLES, sample_seconds=seconds)
    gb_s = 2 * 4 * items / copied.median_us / 1e3
    file.add(PART, "copy", gb_s=round(gb_s, 1), bytes=8 * items, compile_seconds=compile_seconds, **asdict(copied))
    del x
    a, b = (noise(seed, (side, side), jnp.bfloat16) for seed in (1, 2))
    b = b / side**0.5  # so that a product of products stays of size one
    product, compile_seconds = timing.compiled(lambda a, b: a @ b, a, b)
    multiplied, _ = timing.measure(lambda a: product(a, b), a, calls=1, samples=SAMPLES, sample_seconds=seconds)
    tflop_s = 2 * side**3 / multiplied.median_us / 1e6
    file.add(
        PART, "matmul", tflop_s=round(tflop_s, 1), side=side, compile_seconds=compile_seconds, **asdict(multiplied)
    )
    return Ceilings(gb_s, tflop_s)


def known(folder: Path, *, tiny: bool) -> Ceilings:
    """Those in `folder` of this device, measured now if there are none."""
    device = jax.devices()[0].device_kind
    read = rows.read(folder.glob("*.jsonl"))
    found = {row["name"]: row for row in read if (row["part"], row["device"]) == (PART, device)}
    if found.keys() >= {"copy", "matmul"}:
        return Ceilings(found["copy"]["gb_s"], found["matmul"]["tflop_s"])
    return measure(rows.open_rows(folder), tiny=tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of rows")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to walk the code")
    args = parser.parse_args()
    found = measure(rows.open_rows(args.out), tiny=args.tiny)
    print(f"copy {found.copy_gb_s:,.0f} GB/s, bf16 matmul {found.matmul_tflop_s:,.0f} TFLOP/s")


if __name__ == "__main__":
    main()
