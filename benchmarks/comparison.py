"""The same 256 requests of mixed length through jaxserve and through transformers, on the same card.

    python benchmarks/comparison.py --engine jaxserve|transformers [--requests 256] [--seconds 60] [--out DIR] [--tiny]

a  transformers, one request at a time       `generate`, batch 1
b  transformers, eight at a time             `generate`, padded to the longest prompt, run to the longest answer
c  transformers, continuous batching         its own manager, all requests at once
d  jaxserve with its defaults                one `LLM.generate`, all requests at once
d2 d, but with a beginning of 2,048 tokens of its own before every prompt
e  d2, but the beginning is the same for all

Llama-2-13B with random weights in bfloat16, greedy, end-of-sequence ignored, prompts of 32 to 1,024 token ids and
answers of 32 to 512. a, b and c stop after about --seconds: they then did the first so many requests, and their rows
say how many; c counts the tokens of requests it finished. Output tokens a second are those that were asked for: what a
batch generates beyond a request's length is not counted. Each engine runs in a process of its own, one after the other.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu import rows
from gpu.models import MODELS, hf_config, write_model
from gpu.workload import Job, mixed_jobs, prefixed
from report import RESULTS

PART = "comparison"
BATCH = 8


def add(file: rows.RowFile, name: str, engine: str, of: int, done: list[Job], seconds: float, **more: Any) -> None:
    """A row about the jobs that were done."""
    output = sum(job.output_tokens for job in done)
    prompt = sum(len(job.prompt) for job in done)
    file.add(
        PART,
        name,
        engine=engine,
        requests=len(done),
        of_requests=of,
        prompt_tokens=prompt,
        output_tokens=output,
        seconds=round(seconds, 3),
        output_tokens_per_s=round(output / seconds, 2),
        tokens_per_s=round((prompt + output) / seconds, 2),
        **more,
    )


def run_jaxserve(args: argparse.Namespace, jobs: list[Job], file_of: Callable[[], rows.RowFile]) -> None:
    """d, d2 and e on one engine."""
    import jaxserve

    vocab_size = MODELS[args.model]["vocab_size"]
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 65} if args.tiny else {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), args.model)
        began = time.perf_counter()
        llm = jaxserve.LLM(directory, load_format="dummy", show_progress=False, **sizes)
    with llm:
        start_seconds = round(time.perf_counter() - began, 1)
        file = file_of()
        named = {
            "d": ("jaxserve, defaults", jobs),
            "e": ("jaxserve, a beginning that all share", prefixed(jobs, vocab_size, shared=True, tiny=args.tiny)),
            "d2": ("jaxserve, a beginning each", prefixed(jobs, vocab_size, shared=False, tiny=args.tiny)),
        }
        generate(llm, jobs[:BATCH])  # the first step of any program loads it onto the card
        for name, (engine, work) in named.items():
            llm.reset_prefix_cache()
            before = llm.stats()
            start = time.perf_counter()
            generate(llm, work)
            seconds = time.perf_counter() - start
            after = llm.stats()
            add(
                file,
                name,
                engine,
                len(jobs),
                work,
                seconds,
                cached_prompt_tokens=after.prefix_hit_tokens - before.prefix_hit_tokens,
                mean_rows=round(
                    (after.mean_rows * after.steps - before.mean_rows * before.steps) / (after.steps - before.steps), 1
                ),
                start_seconds=start_seconds,
            )


def generate(llm: Any, jobs: list[Job]) -> None:
    """All at once; every one must come out as long as asked for."""
    import jaxserve

    params = [
        jaxserve.SamplingParams(temperature=0.0, max_tokens=job.output_tokens, ignore_eos=True, detokenize=False)
        for job in jobs
    ]
    outputs = llm.generate([job.prompt for job in jobs], params)
    for job, output in zip(jobs, outputs, strict=True):
        made = len(output.outputs[0].token_ids)
        assert made == job.output_tokens, f"{made} tokens instead of {job.output_tokens}"


def run_transformers(args: argparse.Namespace, jobs: list[Job], file_of: Callable[[], rows.RowFile]) -> None:
    """a, b and c on one model; whichever fails is told in its row, and the others run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cpu" if args.tiny else "cuda"
    dtype = torch.float32 if args.tiny else torch.bfloat16
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**hf_config(args.model))).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    file = file_of()
    ways: dict[str, tuple[str, Callable[[], tuple[list[Job], float]]]] = {
        "a": ("transformers, batch 1", lambda: static(model, jobs, 1, args.seconds)),
        "b": (f"transformers, batch {BATCH}", lambda: static(model, jobs, BATCH, args.seconds)),
        "c": ("transformers, continuous batching", lambda: continuous(model, jobs, args.seconds)),
    }
    failures = 0
    for name, (engine, way) in ways.items():
        try:
            static(model, [Job(job.prompt, 2) for job in jobs[:BATCH]], BATCH, 0.0)  # warms its kernels
            done, seconds = way()
            add(file, name, engine, len(jobs), done, seconds)
        except Exception as error:
            failures += 1
            told = str(error).partition("\n")[0]
            file.add(PART, name, engine=engine, error=f"{type(error).__name__}: {told}")
    if failures:
        raise SystemExit(f"{failures} of {len(ways)} ways failed")


def static(model: Any, jobs: list[Job], batch: int, seconds: float) -> tuple[list[Job], float]:
    """(jobs done, seconds taken): batches of `batch`, none begun after `seconds`."""
    import torch

    done: list[Job] = []
    start = time.perf_counter()
    for group in batches(jobs, batch):
        longest = max(len(job.prompt) for job in group)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in group], device=model.device)
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in group])
        tokens = max(job.output_tokens for job in group)
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=mask.to(model.device), max_new_tokens=tokens, do_sample=False, use_cache=True
            )
        made = whole[:, longest:].cpu()  # waits for the device
        assert made.shape == (len(group), tokens), f"{tuple(made.shape)} tokens instead of {(len(group), tokens)}"
        done += group
        if time.perf_counter() - start > seconds:
            break
    return done, time.perf_counter() - start


def batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    for first in range(0, len(jobs), size):
        yield jobs[first : first + size]


def continuous(model: Any, jobs: list[Job], seconds: float) -> tuple[list[Job], float]:
    """(jobs done, seconds taken), all queued at once, given up after `seconds`."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
    done: list[Job] = []
    with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
        start = end = time.perf_counter()
        for i, job in enumerate(jobs):
            manager.add_request(job.prompt, request_id=str(i), max_new_tokens=job.output_tokens, eos_token_id=-1)
        while len(done) < len(jobs) and end - start < seconds:
            result = manager.get_result(timeout=1)
            end = time.perf_counter()
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                job = jobs[int(result.request_id)]
                made = len(result.generated_tokens)
                assert made == job.output_tokens, f"{made} tokens instead of {job.output_tokens}"
                done.append(job)
    if not done:
        raise RuntimeError(f"no request finished in {seconds:.0f} s")
    return done, end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["jaxserve", "transformers"], required=True)
    parser.add_argument("--model", choices=[*MODELS], default="Llama-2-13B")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of a, b and c")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 3 requests, to walk the code on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.requests = "tiny", 3
    jobs = mixed_jobs(args.requests, MODELS[args.model]["vocab_size"], tiny=args.tiny)
    if args.engine == "jaxserve":
        run_jaxserve(args, jobs, lambda: rows.open_rows(args.out))
    else:
        run_transformers(args, jobs, lambda: rows.open_rows(args.out, device=torch_device(args.tiny)))


def torch_device(tiny: bool) -> str:
    """What JAX would call it, without JAX taking the card's memory."""
    import torch

    return "cpu" if tiny else torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
