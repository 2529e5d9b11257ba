"""What a server's memory is for: a table in a terminal, JSON elsewhere; at its start, and before anything is loaded."""

import json
import logging
import sys
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower.checkpoints.hf import read_config
from twotower.checkpoints.hf.config_file import as_dtype, stored_dtype
from twotower.checkpoints.hf.tensor_files import scan
from twotower.cli.options import Dtype, open_device
from twotower.engine.config import EngineConfig
from twotower.engine.memory_plan import MemoryPlan, places_before_loading, plan_memory
from twotower.engine.memory_report import memory_fields, memory_rows
from twotower.errors import SettingError
from twotower.planning.machine import DeviceMemory, device_memory

logger = logging.getLogger(__name__)


def show_memory(plan: MemoryPlan) -> None:
    """The table on stderr where that is a terminal, else a line of log."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(memory_table(plan))
    else:
        logger.info("memory", extra={"fields": memory_fields(plan)})


def print_plan(plan: MemoryPlan) -> None:
    """The table, or one JSON object where stdout is no terminal, with what the plan warns of."""
    if not sys.stdout.isatty():
        print(json.dumps(memory_fields(plan) | {"warnings": plan.warnings}))
        return
    console = Console()
    console.print(memory_table(plan))
    for warning in plan.warnings:
        console.print(Text(f"! {warning}", "yellow"), soft_wrap=True)


def memory_table(plan: MemoryPlan) -> Table:
    """The rows of `memory_rows`."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("memory")
    table.add_column(plan.places.context.name)
    table.add_column("", justify="right", no_wrap=True)
    for row in memory_rows(plan):
        table.add_row(*row)
    return table


def plan_for(
    folder: Path,
    limits: EngineConfig,
    *,
    device: str,
    context_device: str | None,
    denoiser_device: str | None,
    dtype: Dtype | None,
    gigabytes: float | None,
) -> MemoryPlan:
    """What an engine on the checkpoint of a folder, of which no weights are read, would do with the memory of its
    devices: of `gigabytes` each, or with what is free on this machine's. Raises ValueError where nothing would fit."""
    config = read_config(folder)
    kind = stored_dtype(config) if dtype is None else as_dtype(dtype)
    if kind is None:
        kind = scan(folder).specs["context_tower.embeddings.weight"].dtype
    context, denoiser = context_device or device, denoiser_device or device
    places = [_memory(name, gigabytes) for name in dict.fromkeys((context, denoiser))]
    return plan_memory(config, places_before_loading(config, kind, *places), limits)


def _memory(name: str, gigabytes: float | None) -> DeviceMemory:
    if gigabytes is None:
        return device_memory(open_device(name))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError("device", name, "cpu, cuda, cuda:N or mps") from error
    return DeviceMemory(str(device), int(gigabytes * 1e9), int(gigabytes * 1e9))
