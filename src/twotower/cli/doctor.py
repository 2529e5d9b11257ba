"""`twotower doctor`: what this machine offers, what twotower makes of it, and what slows it down."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub.constants
import torch
import typer
from rich.console import Console
from rich.text import Text

from twotower.backends.choose import choose_backend, native_build
from twotower.backends.protocol import BackendChoice
from twotower.cli.threads import allowed_cores, core_limit
from twotower.ops.linear import cpu_has_bf16_matmul
from twotower.origin import cpu_model

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Facts = dict[str, dict[str, Any]]

_PACKAGES = ("twotower", "torch", "numpy", "triton", "tokenizers", "safetensors", "huggingface-hub", "typer", "fastapi")
# Vector and matrix instructions that the C kernels or PyTorch's use, as /proc/cpuinfo names them
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_DTYPES = (torch.float32, torch.bfloat16)
_WATCHED_SECONDS = 0.3
_BUSY_CORES = 0.3  # less than this, used by other processes, is not worth a word


@app.command("doctor")
def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, such as an issue asks for.")] = False,
) -> None:
    """Show versions, CPU, backend, threads, devices and caches, with advice on whatever makes decoding slow here.

    Compiles the C kernels if they aren't built yet, and watches for a moment what else uses the cores.
    """
    found = examine()
    advice = advise(found)
    if as_json:
        print(json.dumps({**found, "advice": advice}))
        return
    console = Console()
    for section, facts in found.items():
        console.print(Text(section, "bold"))
        for name, value in facts.items():
            line = Text.assemble((f"  {name if name.isupper() else name.replace('_', ' ')}: ", "dim"), _shown(value))
            console.print(line, soft_wrap=True)
    for remedy in advice:
        console.print(Text(f"! {remedy}", "yellow"), soft_wrap=True)
    if not advice:
        console.print(Text("Nothing that was looked at slows decoding down.", "green"))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def examine() -> Facts:
    """Facts of this machine by section and name; None stands for what it doesn't have or doesn't tell."""
    backend = _backend()
    kernels = None if backend["kernels"] is None else _folder(Path(backend["kernels"]).parent)
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "backend": backend,
        "threads": _threads(),
        "devices": _devices(),
        "caches": {"hub": _folder(Path(huggingface_hub.constants.HF_HUB_CACHE)), "kernels": kernels},
    }


def advise(found: Facts) -> list[str]:
    """A line for each of the facts that makes decoding slow, with what to do about it."""
    cpu, backend, threads, devices = (found[name] for name in ("cpu", "backend", "threads", "devices"))
    cores, used = cpu["usable_cores"], threads["torch_threads"]
    lines = []
    if backend["slowed_by"]:
        lines.append(backend["slowed_by"])
    if used < cores and threads["OMP_NUM_THREADS"]:  # by itself torch takes one thread for each physical core
        lines.append(f"OMP_NUM_THREADS is {threads['OMP_NUM_THREADS']} of {cores} cores; set it to {cores}")
    if used > cores:
        lines.append(f"torch runs {used} threads on {cores} usable cores; set OMP_NUM_THREADS={cores}")
    if (taken := threads["cores_used_by_others"] or 0) > _BUSY_CORES:
        most = f", most of all {threads['busiest_process']}" if threads["busiest_process"] else ""
        lines.append(f"other processes take {taken} of {cpu['cores']} cores{most}; stop them, or expect less speed")
    if platform.machine() in ("x86_64", "AMD64") and cpu["instructions"] and "avx2" not in cpu["instructions"]:
        lines.append("the CPU has no AVX2, so the kernels compute with narrower vectors; use a newer CPU if you can")
    lines += [f"torch is built without {name}; install a wheel from pytorch.org" for name in devices["torch_lacks"]]
    if devices["nvidia_driver"] and not devices["gpus"]:
        lines.append("an NVIDIA driver is here, but torch finds no GPU; install a torch built for this driver's CUDA")
    return lines


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "os": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> dict[str, Any]:
    flags = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features"))), "")
    cores = os.cpu_count() or 1
    allowed, limit = allowed_cores(), core_limit()
    return {
        "model": cpu_model(),
        "cores": cores,
        "usable_cores": allowed if limit is None else min(allowed, max(1, int(limit))),
        "cgroup_limit_cores": limit,
        "instructions": [name for name in _INSTRUCTIONS if name in flags.split()],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "bf16_products_in_hardware": cpu_has_bf16_matmul(),
        "cgroup_limit_memory_bytes": _number(_read("/sys/fs/cgroup/memory.max")),
    }


def _backend() -> dict[str, Any]:
    compiler, library = native_build()
    choices = {dtype: choose_backend("cpu", dtype) for dtype in _DTYPES}
    return {
        "compiler": compiler,
        "compiler_version": None if compiler is None else _first_line(compiler, "--version"),
        "kernels": library,
        **{f"on_cpu_in_{str(dtype).removeprefix('torch.')}": _told(choice) for dtype, choice in choices.items()},
        "slowed_by": next((choice.advice for choice in choices.values() if choice.advice), None),
    }


def _threads() -> dict[str, Any]:
    others, busiest = _other_load()
    return {
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS"),
        "load_average": [float(value) for value in _read("/proc/loadavg").split()[:3]] or None,
        "cores_used_by_others": others,
        "busiest_process": busiest,
    }


def _other_load() -> tuple[float | None, str | None]:
    """Cores that other processes keep busy, on Linux, and the name of the busiest that can be seen from here."""
    before, own, began = _ticks(), os.times(), time.perf_counter()
    time.sleep(_WATCHED_SECONDS)
    after, own_after, seconds = _ticks(), os.times(), time.perf_counter() - began
    if not before or not after:
        return None, None
    per_second = os.sysconf("SC_CLK_TCK") * seconds
    ours = own_after.user + own_after.system - own.user - own.system
    busy = max(0.0, (after["all"] - before["all"]) / per_second - ours / seconds)
    used = {name: ticks - before[name] for name, ticks in after.items() if name in before and name != "all"}
    name = max(used, key=lambda one: used[one], default=None)
    return round(busy, 1), None if name is None or used[name] == 0 else name


def _ticks() -> dict[str, int]:
    """Clock ticks of CPU used so far by every other process by name and number, and by "all" of the machine."""
    total = _read("/proc/stat").splitlines()[:1]
    if not total:
        return {}
    user, nice, system, _idle, _wait, irq, softirq, *rest = map(int, total[0].split()[1:])
    found = {"all": user + nice + system + irq + softirq + sum(rest[:1])}
    for folder in Path("/proc").glob("[0-9]*"):
        name, _, fields = _read(folder / "stat").partition(") ")  # a name may hold blanks
        if fields and folder.name != str(os.getpid()):
            found[f"{name.partition('(')[2]} ({folder.name})"] = sum(map(int, fields.split()[11:13]))
    return found


def _devices() -> dict[str, Any]:
    lacks = {"oneDNN": torch.backends.mkldnn.is_available(), "OpenMP": torch.backends.openmp.is_available()}
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus],
        "cuda_of_torch": torch.version.cuda,
        "nvidia_driver": _read("/proc/driver/nvidia/version").partition("\n")[0] or None,
        "mps": torch.backends.mps.is_available(),
        "torch_lacks": [name for name, there in lacks.items() if not there],
    }


def _folder(folder: Path) -> str:
    """A cache's folder and its size on disk; what the hub stores once and links to counts once."""
    try:
        sizes = [file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()] if folder.is_dir() else []
    except OSError as error:
        return f"{folder} (can't be read: {error.strerror})"
    return f"{folder} ({sum(sizes) / 1e6:,.1f} MB in {len(sizes)} files)"


def _read(file: str | Path) -> str:
    """A file of the kernel's, "" where this machine doesn't have it or doesn't let us read it."""
    try:
        return Path(file).read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _first_line(*program: str) -> str | None:
    """The first line that a program prints; None where it can't be run."""
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _told(choice: BackendChoice) -> str:
    return f"{choice.name} ({choice.reason})"
