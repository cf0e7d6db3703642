"""Start-up of an engine that serves: a configuration goes in, a running `EngineLoop` and its `EngineInfo` come out."""

from dataclasses import asdict

from rich.console import Console

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Prepared, Report, StartupTimes, no_report, prepare, start_core
from jaxserve.engine.loop import EngineLoop
from server.frontend.engine_client import EngineInfo


def start_engine(config: EngineConfig, report: Report = no_report, restarts: int = 0) -> tuple[EngineLoop, EngineInfo]:
    """Raises what `prepare` and `start_core` raise. Shows the memory plan before anything is loaded."""
    prepared = prepare(config, report)
    if config.show_progress:
        Console(stderr=True).print(prepared.plan.table())
    core, times = start_core(config, prepared, report)
    return EngineLoop(core), engine_info(config, prepared, times, restarts)


def engine_info(config: EngineConfig, prepared: Prepared, times: StartupTimes, restarts: int = 0) -> EngineInfo:
    """What an engine tells its front ends."""
    plan, dimensions = prepared.plan, prepared.dimensions
    return EngineInfo(
        limits=prepared.limits,
        vocab_size=dimensions.model.vocab_size,
        eos_token_ids=tuple(dimensions.model.eos_token_ids),
        max_logprobs=config.scheduler.max_logprobs,
        device=prepared.device.device_kind,
        platform=prepared.device.platform,
        dtype=dimensions.dtype,
        memory_plan={
            "weight_bytes": plan.weight_bytes,
            "slot_bytes": plan.slot_bytes,
            "step_bytes": plan.step_bytes,
            "pool_bytes": plan.pool_bytes,
            "used_bytes": plan.used_bytes,
            "budget_bytes": plan.budget_bytes,
            "total_bytes": plan.total_bytes,
            "num_pages": plan.num_pages,
            "page_size": plan.page_size,
        },
        startup_seconds=asdict(times),
        restarts=restarts,
    )
