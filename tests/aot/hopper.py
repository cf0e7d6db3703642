"""Compiles for an NVIDIA H200 on a machine without a GPU, down to machine code, and reads what came out.

The CUDA plugin of JAX holds the whole compiler; told the properties of a device, it needs none. What it cannot do here:
choose matrix-multiplication algorithms by measuring, use cuDNN, and run anything. Its PTX is assembled once more with
NVIDIA's ptxas, which tells registers and spills, and disassembled with cuobjdump.

The environment has to be set before JAX is imported, which importing this module first does.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="jaxserve-aot-"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there are no CUDA libraries to check
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=.*ptx.*"

import jax
from jax.experimental import topologies

# The public datasheet of an H200 in the form the compiler asks for; openxla/xla has the like for many devices.
H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 } runtime_version { major: 12 minor: 9 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200" cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}
"""


@dataclass(frozen=True)
class Kernel:
    """One function of the compiled module."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int  # static; Triton's dynamic shared memory is not in it
    instructions: Counter[str] = field(repr=False)  # SASS opcode with its modifiers -> how often it stands there

    def count(self, prefix: str, *modifiers: str) -> int:
        """Instructions whose opcode starts with `prefix` and holds all `modifiers`: count("LDGSTS", "128")."""
        return sum(
            n
            for opcode, n in self.instructions.items()
            if opcode.startswith(prefix) and all(f".{m}" in opcode for m in modifiers)
        )


@dataclass(frozen=True)
class Report:
    """What compiling one program gave."""

    compiled: Any
    kernels: dict[str, Kernel]
    text: str = field(repr=False)  # optimised HLO
    command_buffers: list[int]  # thunks in each captured command buffer (CUDA graph)
    loose_thunks: Counter[str]  # what is launched outside of them, by kind

    @property
    def temp_bytes(self) -> int:
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def alias_bytes(self) -> int:
        return self.compiled.memory_analysis().alias_size_in_bytes


@cache
def mesh() -> jax.sharding.Mesh:
    """A mesh of one H200."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("device",))


def placed(tree: Any) -> Any:
    """`jax.ShapeDtypeStruct` leaves (or arrays) as shapes that live on the H200."""
    sharding = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_kernel(function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Report:
    """Compiles `function` of these shapes and disassembles every kernel that came out."""
    return report(lambda: jax.jit(function, donate_argnums=donate).lower(*placed(args)).compile(), disassemble=True)


def report(compile_: Callable[[], Any], *, disassemble: bool) -> Report:
    """Runs `compile_` for an H200 and gathers what it left behind. disassemble: kernels too, which takes a while."""
    _empty(DUMP)
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        compiled = compile_()
    thunks = sorted(DUMP.glob("*thunk_sequence_after_thunk_passes.txt"), key=os.path.getmtime)
    plain = sorted(DUMP.glob("*thunk_sequence.txt"), key=os.path.getmtime)
    captured, loose = _thunks((thunks or plain)[-1].read_text()) if thunks or plain else ([], Counter())
    kernels = {}
    if disassemble:
        for ptx in sorted(DUMP.glob("*.ptx")):
            kernels.update(_kernels(ptx))
    return Report(compiled, kernels, compiled.as_text(), captured, loose)


def tool(name: str) -> Path:
    """ptxas, or cuobjdump with the nvdisasm it starts; both from the wheels of the extra `aot`."""
    found = sorted(Path(sysconfig.get_path("purelib"), "nvidia").rglob(f"bin/{name}"))
    if not found:
        raise FileNotFoundError(f"{name} is not installed here: pip install '.[aot]'")
    return found[0]


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _run(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([tool(name), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done


def _kernels(ptx: Path) -> dict[str, Kernel]:
    if ".entry" not in ptx.read_text():
        return {}
    cubin = ptx.with_suffix(".cubin")
    assembled = _run("ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin)
    dumped = _run("cuobjdump", "--dump-sass", cubin)
    code: dict[str, Counter[str]] = {}
    name = ""
    for line in dumped.stdout.splitlines():
        if "Function :" in line:
            name = line.split(":")[1].strip()
            code[name] = Counter()
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            code[name][found[1]] += 1
    kernels = {}
    sections = re.split(r"Compiling entry function '(\w+)'", assembled.stderr)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        numbers = {
            what: int(found[1]) if (found := re.search(pattern, text)) else 0
            for what, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spill_bytes", r"(\d+) bytes spill stores"),
                ("shared_bytes", r"(\d+) bytes smem"),
            )
        }
        kernels[name] = Kernel(name=name, instructions=code.get(name, Counter()), **numbers)
    return kernels


def _thunks(text: str) -> tuple[list[int], Counter[str]]:
    """(thunks in each command buffer, kinds of the thunks outside of any); nested ones are indented."""
    captured: list[int] = []
    loose: Counter[str] = Counter()
    inside = False
    for line in text.splitlines():
        found = re.match(r"(\s*)\d+: (k\w+)", line)
        if not found:
            continue
        if not found[1]:
            inside = found[2] == "kCommandBuffer"
            if inside:
                captured.append(0)
                continue
        if inside:
            captured[-1] += 1
        else:
            loose[found[2]] += 1
    return captured, loose
