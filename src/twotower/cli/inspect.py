"""`twotower inspect`: what a checkpoint holds, from its config and the headers of its files."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower.backends.choose import choose_backend
from twotower.backends.protocol import BackendChoice
from twotower.checkpoints.hf import read_config, released_shapes, resolve
from twotower.checkpoints.hf.calibration_file import read_calibration
from twotower.checkpoints.hf.generation_file import read_sampling_defaults
from twotower.checkpoints.hf.tensor_files import TensorFiles, scan
from twotower.checkpoints.load import DEFAULT_CHECKPOINT
from twotower.cli.options import ModelArgument
from twotower.config import TwoTowerConfig
from twotower.model.calibration import Calibration
from twotower.planning.footprint import PARTS, Place, parameters, released_tensors, state_bytes
from twotower.planning.machine import in_words

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LENGTHS = [256, 2048, 16384, 131072]


@dataclasses.dataclass(frozen=True)
class Differences:
    """Tensors that the config asks for and no file holds, the reverse, and name -> (stored, asked) shapes."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)


@app.command("inspect")
def command(
    model: ModelArgument = None,
    context_length: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Tokens of context to give the memory for; may be given several times.",
            show_default=str(_LENGTHS),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show parameters per part and tower, memory per dtype and context length, and every tensor that differs from what
    the config asks for; then the exit code is 1. Reads no weights.

    Says which backend computes on this machine's CPU, and why; up to what target_retention may be asked for; and what
    mode verified drafts from.
    """
    directory = DEFAULT_CHECKPOINT if model is None else resolve(model)
    config = read_config(directory)
    files = scan(directory)
    differences = compare(released_shapes(config), files)
    lengths = context_length or _LENGTHS
    calibration, drafter = read_calibration(directory, None), read_sampling_defaults(directory).drafter or "denoiser"
    if as_json:
        found = _report(str(directory), config, files, differences, lengths)
        most = None if calibration is None else calibration.most or None
        print(json.dumps(found | {"target_retention": most, "drafter": drafter}))
    else:
        _print(str(directory), config, files, differences, lengths)
        print(_promise(calibration))
        print(f"Mode verified has its drafts from {drafter} unless told otherwise.")
    if differences:
        raise typer.Exit(1)


def _promise(calibration: Calibration | None) -> str:
    if calibration is None or not calibration.rules:
        return "target_retention can't be asked for: there is no calibration; twotower calibrate makes one."
    return (
        f"target_retention may be up to {calibration.most_told}, by a calibration on {calibration.num_prompts} prompts "
        f"of {calibration.prompts}; whether it is of these weights is seen when they are loaded."
    )


def compare(expected: Mapping[str, tuple[int, ...]], files: TensorFiles) -> Differences:
    """Where a directory's tensors differ from the names and shapes its config asks for."""
    found = {name: spec.shape for name, spec in files.specs.items()}
    return Differences(
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected],
        wrong_shape={n: (found[n], shape) for n, shape in expected.items() if n in found and found[n] != shape},
    )


def _weight_bytes(config: TwoTowerConfig) -> dict[str, int]:
    return {
        name: sum(tensor.nbytes for tensor in released_tensors(config, dtype).values())
        for name, dtype in _DTYPES.items()
    }


def _stored(files: TensorFiles) -> dict[str, int]:
    """Stored dtype -> its number of parameters."""
    counts: dict[str, int] = {}
    for spec in files.specs.values():
        name = str(spec.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + torch.Size(spec.shape).numel()
    return counts


def _report(
    directory: str, config: TwoTowerConfig, files: TensorFiles, differences: Differences, lengths: list[int]
) -> dict[str, Any]:
    counts = parameters(config)
    states = [
        {"context_length": length, "dtype": name, **state_bytes(config, length, dtype)._asdict()}
        for length in lengths
        for name, dtype in _DTYPES.items()
    ]
    return {
        "path": directory,
        "pattern": config.pattern,
        "denoiser_layers": list(config.denoiser_indices),
        "block_size": config.block_size,
        "parameters": {
            tower: {where.part: count for where, count in counts.items() if where.tower == tower}
            for tower in ("context", "denoiser")
        },
        "total_parameters": sum(counts.values()),
        "tied_head": config.tie_word_embeddings,
        "stored_parameters": _stored(files),
        "weight_bytes": _weight_bytes(config),
        "backends": {
            name: dataclasses.asdict(choose_backend("cpu", dtype, None, config)) for name, dtype in _DTYPES.items()
        },
        "state_bytes": states,
        "differences": dataclasses.asdict(differences),
    }


def _backend(dtype: torch.dtype, config: TwoTowerConfig) -> BackendChoice:
    return choose_backend("cpu", dtype, None, config)


def _print(
    directory: str, config: TwoTowerConfig, files: TensorFiles, differences: Differences, lengths: list[int]
) -> None:
    console = Console()
    console.print(Text(directory, "bold"), soft_wrap=True)
    stored = ", ".join(f"{count:,} parameters in {name}" for name, count in _stored(files).items())
    console.print(Text(f"{config.num_layers} layers {config.pattern}, blocks of {config.block_size}; stored: {stored}"))
    if config.denoiser_layers is not None:
        own = config.denoiser_layers
        kinds, numbers = "".join(config.pattern[i] for i in own), ", ".join(map(str, own))
        console.print(Text(f"of them the denoiser has {len(own)}, {kinds}: {numbers}"))
    console.print(_parameter_table(config))
    console.print(_memory_table(config, lengths))
    for dtype in _DTYPES.values():
        choice = _backend(dtype, config)
        console.print(Text(f"Backend {choice.name}: {choice.reason}."), soft_wrap=True)
    for line in _difference_lines(differences):
        console.print(Text(line, "red"), soft_wrap=True)
    if not differences:
        console.print(Text(f"All {len(files.specs)} tensors are those that the config asks for.", "green"))


def _parameter_table(config: TwoTowerConfig) -> Table:
    counts = parameters(config)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    totals = {tower: sum(n for where, n in counts.items() if where.tower == tower) for tower in ("context", "denoiser")}
    table.add_column("parameters", footer="total")
    table.add_column("context tower", f"{totals['context']:,}", justify="right")
    table.add_column("denoiser tower", f"{totals['denoiser']:,}", justify="right")
    table.add_column("both", f"{sum(totals.values()):,}", justify="right")
    for part in PARTS:
        context, denoiser = counts.get(Place("context", part), 0), counts.get(Place("denoiser", part), 0)
        if part == "head" and config.tie_word_embeddings:
            table.add_row(part, *["the embeddings"] * 2, "")
        elif context or denoiser:
            table.add_row(part, f"{context:,}", f"{denoiser:,}", f"{context + denoiser:,}")
    return table


def _memory_table(config: TwoTowerConfig, lengths: list[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("memory")
    for name in _DTYPES:
        table.add_column(name, justify="right")
    table.add_row("weights of both towers", *(in_words(n) for n in _weight_bytes(config).values()))
    fixed = [state_bytes(config, 0, dtype).recurrent for dtype in _DTYPES.values()]
    if any(fixed):
        table.add_row("recurrent state of a sequence", *map(in_words, fixed))
    for length in lengths if "*" in config.pattern else []:
        sizes = [state_bytes(config, length, dtype).keys_and_values for dtype in _DTYPES.values()]
        table.add_row(f"keys and values of {length:,} tokens", *map(in_words, sizes))
    return table


def _difference_lines(differences: Differences) -> list[str]:
    lines = [f"missing: {name}" for name in differences.missing]
    lines += [f"unexpected: {name}" for name in differences.unexpected]
    shapes = differences.wrong_shape.items()
    return lines + [f"wrong shape: {name} is {stored}, must be {asked}" for name, (stored, asked) in shapes]
