"""The device the engine runs on: which one, and how much memory it may use."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import psutil

from pallas_kernels.dispatch import Target

USABLE = 0.98  # of XLA's GPU pool; the rest goes to fragmentation and to the small arrays of a step
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes: what the device has, and what jaxserve may take of it now."""

    total: int
    budget: int


def open_device(memory_utilization: float) -> jax.Device:
    """The first device of JAX's default backend."""
    # XLA reserves its pool of GPU memory when the first device is opened and reads its share from here only.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_utilization))
    return jax.devices()[0]


def dispatch_target(device: jax.Device) -> Target:
    """What kernels are chosen by."""
    if device.platform == "cpu":
        return Target("cpu")
    major, minor = (int(number) for number in device.compute_capability.split("."))
    return Target(device.platform, device.device_kind, (major, minor), device.core_count)


def device_memory(device: jax.Device, memory_utilization: float) -> DeviceMemory:
    """On a GPU, nearly all that XLA's pool has left; on CPU, `memory_utilization` of what is available now."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        left = stats["bytes_limit"] - stats["bytes_in_use"]
        return DeviceMemory(total=stats["bytes_limit"], budget=int(left * USABLE))
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    if limit != "max":
        used = psutil.Process().memory_info().rss
        total, available = min(total, int(limit)), min(available, int(limit) - used)
    return DeviceMemory(total=total, budget=int(available * memory_utilization))
