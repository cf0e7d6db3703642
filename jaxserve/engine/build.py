"""Start-up: settings to a running engine, in the order that fails early and shows its numbers first.

open checkpoint ─► plan memory (compile the largest step) ─► table ─► stream weights ─► compile ladder ─► probe
"""

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.engine import backends
from jaxserve.engine.core import EngineCore
from jaxserve.engine.stats import StepCounters
from jaxserve.errors import ConfigError, EngineError, MemoryPlanError
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.loading.default_model import default_model_path
from jaxserve.loading.progress import Progress, progress_bar
from jaxserve.loading.weights import dummy_params, load_params, param_shapes
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import model_config
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.device import DeviceMemory, device_memory, open_device
from jaxserve.runner.dimensions import Dimensions
from jaxserve.runner.executables import compile_all, compile_step, enable_compilation_cache
from jaxserve.runner.memory import MemoryPlan, addressable_pages, check_fits, pool_pages, size
from jaxserve.runner.runner import Runner
from jaxserve.scheduling.limits import Limits
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.shapes import StepShape, ladder

logger = logging.getLogger(__name__)

Report = Callable[[str, str], None]  # (phase, how far it is), called from any thread


def no_report(phase: str, detail: str) -> None:
    """For callers that need not know."""


# (max_num_seqs, max_num_batched_tokens) where the configuration leaves them open
DEFAULT_SIZES = {"cpu": (32, 512), "gpu": (256, 8192)}


@dataclass(frozen=True)
class Prepared:
    """A start-up that is settled but for the weights."""

    checkpoint: Checkpoint
    device: jax.Device
    dimensions: Dimensions
    ladder: list[StepShape]
    max_num_batched_tokens: int
    plan: MemoryPlan
    compiled: dict[StepShape, Any]  # programs the plan needed and the engine can use
    seconds: float  # it took

    @property
    def limits(self) -> Limits:
        return Limits(
            num_pages=self.dimensions.num_pages,
            page_size=self.dimensions.page_size,
            max_num_seqs=self.dimensions.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.dimensions.max_model_len,
        )


@dataclass(frozen=True)
class StartupTimes:
    """Seconds, by phase."""

    plan: float  # checkpoint opened, largest step compiled
    load: float
    compile: float  # the rest of the ladder
    probe: float


def prepare(config: EngineConfig, report: Report = no_report) -> Prepared:
    """Opens the checkpoint and plans the memory; loads no weights. report: told of every phase, and how far it is.

    Raises ModelError for a checkpoint that cannot be used, ConfigError and MemoryPlanError for settings that cannot.
    """
    began = time.perf_counter()
    report("planning", "")
    model_path = config.model.model or str(default_model_path())
    checkpoint = open_checkpoint(model_path, revision=config.model.revision, load_format=config.model.load_format)
    model = model_config(checkpoint.hf_config, checkpoint.generation_config)
    device = open_device(config.cache.memory_utilization)
    enable_compilation_cache(config.compile)
    seqs, tokens = resolved_sizes(config, device.platform)
    choice = backends.choose(config, model, device)
    shapes = ladder(seqs, tokens, samplers=choice.samplers)
    memory = device_memory(device, config.cache.memory_utilization)
    weight_bytes = tree_bytes(param_shapes(model, choice.dtype, choice.quantisation))
    dimensions = Dimensions(
        model=model,
        kernels=choice.kernels,
        quantisation=choice.quantisation,
        dtype=choice.dtype,
        kv_dtype=choice.kv_dtype,
        platform=device.platform,
        num_pages=2,
        page_size=config.cache.page_size,
        max_num_seqs=seqs,
        max_model_len=config.model.max_model_len or model.max_position_embeddings,
        max_logprobs=min(config.scheduler.max_logprobs, model.vocab_size),
    )
    size_pool = functools.partial(_with_pool, config, memory, weight_bytes)
    dimensions = size_pool(dimensions, step_bytes=0)
    plan = MemoryPlan(
        # The directory of a hub id is named after a commit, which tells nobody anything.
        model=checkpoint.path.name if Path(model_path).exists() else model_path,
        device=device.device_kind,
        dtype=choice.dtype,
        total_bytes=memory.total,
        budget_bytes=memory.budget,
        weight_bytes=weight_bytes,
        slot_bytes=tree_bytes(dimensions.slot_shapes()),
        step_bytes=0,
        page_bytes=dimensions.page_bytes,
        num_pages=dimensions.num_pages,
        page_size=dimensions.page_size,
        max_num_seqs=seqs,
        max_model_len=dimensions.max_model_len,
        model_context=model.max_position_embeddings,
    )
    check_fits(plan)  # before minutes of compiling; the step's own bytes follow
    largest = compile_step(dimensions, shapes[-1])
    usage = largest.memory_analysis()
    step_bytes = usage.temp_size_in_bytes + usage.output_size_in_bytes - usage.alias_size_in_bytes
    final = size_pool(dimensions, step_bytes=step_bytes)
    plan = replace(
        plan,
        step_bytes=step_bytes,
        slot_bytes=tree_bytes(final.slot_shapes()),
        num_pages=final.num_pages,
        max_model_len=final.max_model_len,
    )
    check_fits(plan)
    return Prepared(
        checkpoint=checkpoint,
        device=device,
        dimensions=final,
        ladder=shapes,
        max_num_batched_tokens=tokens,
        plan=plan,
        compiled={shapes[-1]: largest} if final == dimensions else {},
        seconds=time.perf_counter() - began,
    )


def plan_memory_for(config: EngineConfig) -> MemoryPlan:
    """The memory plan of a configuration: compiles the largest step, loads no weights."""
    return prepare(config).plan


def start_core(config: EngineConfig, prepared: Prepared, report: Report = no_report) -> tuple[EngineCore, StartupTimes]:
    """Loads the weights, compiles the ladder, and proves the whole path with one token. report: as for `prepare`."""
    dimensions, device = prepared.dimensions, prepared.device
    show = None if config.show_progress else False
    began = time.perf_counter()
    if config.model.load_format == "dummy":
        params = dummy_params(dimensions.model, dimensions.dtype, config.seed, device, dimensions.quantisation)
    else:
        with progress_bar("loading weights", show) as progress:
            progress = _reported(progress, report, "loading", "{:.0%} of the weights")
            params = load_params(
                prepared.checkpoint, dimensions.model, dimensions.dtype, device, progress, dimensions.quantisation
            )
    loaded = time.perf_counter()
    with progress_bar("compiling steps", show, count_bytes=False) as progress:
        executables = compile_all(
            dimensions,
            prepared.ladder,
            threads=config.compile.compile_threads,
            progress=_reported(progress, report, "compiling", "{:.0%} of the steps"),
            ready=prepared.compiled,
        )
    compiled = time.perf_counter()
    try:
        runner = Runner(dimensions, executables, prepared.ladder, params, device)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise MemoryPlanError(
            f"{prepared.plan.device} could not hold the planned {size(prepared.plan.used_bytes)}: lower "
            f"memory_utilization or num_pages ({reason})"
        ) from error
    scheduler = Scheduler(
        **asdict(prepared.limits),
        policy=config.scheduler.scheduling_policy,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    core = EngineCore(scheduler, runner, config.scheduler.overlap)
    _probe(core)
    ready = time.perf_counter()
    times = StartupTimes(prepared.seconds, loaded - began, compiled - loaded, ready - compiled)
    phases = asdict(times)
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    logger.info("ready after %.1f s (%s)", sum(phases.values()), told)
    return core, times


def _reported(progress: Progress, report: Report, phase: str, form: str) -> Progress:
    """A progress callback that also tells `report`."""

    def both(done: int, total: int) -> None:
        progress(done, total)
        report(phase, form.format(done / total if total else 1.0))

    return both


def resolved_sizes(config: EngineConfig, platform: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) with defaults filled in."""
    default_seqs, default_tokens = DEFAULT_SIZES.get(platform, DEFAULT_SIZES["gpu"])
    tokens = config.scheduler.max_num_batched_tokens
    seqs = config.scheduler.max_num_seqs or min(default_seqs, tokens or default_seqs)
    return seqs, tokens or max(default_tokens, seqs)


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree of shapes."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _with_pool(
    config: EngineConfig, memory: DeviceMemory, weight_bytes: int, dimensions: Dimensions, *, step_bytes: int
) -> Dimensions:
    """The dimensions with the pool the plan allows, and a context that fits it where none was asked for."""
    other = weight_bytes + tree_bytes(dimensions.slot_shapes()) + step_bytes
    pages = pool_pages(
        config.cache, memory, platform=dimensions.platform, page_bytes=dimensions.page_bytes, other_bytes=other
    )
    context = config.model.max_model_len
    model: ModelConfig = dimensions.model
    if dimensions.platform == "gpu":
        page = replace(dimensions, num_pages=1).kv_shapes().k
        usable = addressable_pages(pages, page.size, page.dtype.itemsize)
        if usable < pages:
            logger.warning(
                "%d pages instead of %d: kernels cannot address a float8 pool between 2 and 4 GiB", usable, pages
            )
            pages = usable
    if context is None:
        context = max(2, min(model.max_position_embeddings, (pages - 1) * dimensions.page_size))
    elif context > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={context} exceeds the {model.max_position_embeddings} positions the model was trained for "
            "(max_position_embeddings)"
        )
    return replace(dimensions, num_pages=pages, max_model_len=context)


def _probe(core: EngineCore) -> None:
    """One token through the whole path; leaves no trace in the counters or the prefix cache."""
    core.add(Request(id="probe", prompt_token_ids=[0], params=SamplingParams(temperature=0.0, max_tokens=1)))
    outputs = []
    while core.has_work:
        outputs += core.step()
    if not outputs or outputs[-1].finish_reason not in ("length", "stop"):
        raise EngineError(f"the model could not produce a first token: {outputs}")
    core.scheduler.reset_prefix_cache()
    core.counters = StepCounters()
