"""Makes what `train` starts from of what it is given: two towers of a single one, corpora of tokens of texts."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from twotower.checkpoints.denoiser_layers import chosen_layers
from twotower.checkpoints.hf import holds_two_towers, read_config, resolve
from twotower.checkpoints.initialise import init, open_backbone
from twotower.cli.tokenize import tokenize
from twotower.config import TwoTowerConfig
from twotower.training.corpus.row_length import check_row_length, usual_length
from twotower.training.corpus.shards import is_corpus
from twotower.training.corpus.text import USUAL_LENGTH, TextConfig

# What each result was made of, by its name; None while it is being made. Written before and after each.
_RECORD = "prepared.json"
_Made = dict[str, dict[str, str | int] | None]
_SECONDS_BETWEEN_LOOKS = 0.2


class TrainingInputs(NamedTuple):
    """A two-tower checkpoint, and the folder of shards of each corpus by its name."""

    model: str
    corpora: dict[str, Path]


def prepare(
    model: str,
    sources: Mapping[str, str],
    out: Path,
    row_length: int | None,
    past_positions: bool = False,
    denoiser_layers: str | None = None,
) -> TrainingInputs:
    """Makes `out`/initial of a `model` that is a single tower, or whose denoiser is to be cut to `denoiser_layers`, and
    `out`/NAME of every source that is text.

    A source is a folder of shards, or anything that `read_documents` reads. Results of an earlier call are reused; one
    that was unfinished when that call was killed is made again. Under torchrun rank 0 makes them and the others wait.

    Texts get rows of `row_length` tokens, by default 1,024 or the model's positions if these are fewer. Raises
    SettingError for more than these unless `past_positions`, ValueError where `out` has a result made of something
    else, or lies in a source, and FileExistsError where a folder of that name in `out` was made by something else.
    """
    is_ready = holds_two_towers(model) and denoiser_layers is None
    towers = model if is_ready else str(out / "initial")
    corpora = {name: Path(source) if is_corpus(source) else out / name for name, source in sources.items()}
    texts = {name: source for name, source in sources.items() if not is_corpus(source)}
    wanted: _Made = {} if is_ready else {"initial": {"model": _spelled(model)}}
    if denoiser_layers is not None:
        wanted["initial"] = {"model": _spelled(model), "denoiser_layers": denoiser_layers}
    if texts:
        shapes = towers_config(model)
        length = usual_length(USUAL_LENGTH, shapes) if row_length is None else row_length
        check_row_length("row_length", length, shapes, past_positions)
        config = TextConfig(length=length, past_positions=past_positions)
        for name, source in texts.items():
            wanted[name] = {"model": _spelled(model), "text": _spelled(source), "row_length": length}
    if int(os.environ.get("RANK", "0")):
        while not wanted.items() <= _read(out).items():  # rank 0 reports what is wrong, if anything
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return TrainingInputs(towers, corpora)
    for source in texts.values():
        if Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"{out} lies in {source}, where all files are read as text; give an OUT outside it")
    missing = _missing(out, wanted)
    for name in missing:
        _write(out, _read(out) | {name: None})
        for left in (out / name, *out.glob(f"{name}.partial-*")):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        if name in texts:
            tokenize(towers, texts[name], corpora[name], config)
        else:
            init(model, Path(towers), denoiser_layers=denoiser_layers)
            print(f"{towers} holds two towers made of {model}")
        _write(out, _read(out) | {name: wanted[name]})
    return TrainingInputs(towers, corpora)


def _missing(out: Path, wanted: _Made) -> list[str]:
    """The names of what is still to be made."""
    made = _read(out)
    for name, what in wanted.items():
        if made.get(name) not in (None, what):
            raise ValueError(
                f"{out / name} was made of {made[name]}, not of {what}; give the same again, or another OUT"
            )
        if name not in made and (out / name).exists():
            raise FileExistsError(
                f"{out / name} is there, but was not made by this command; give it in place of what it is to be made "
                "of, or another OUT"
            )
    return [name for name in wanted if made.get(name) is None]


def _spelled(source: str) -> str:
    """One spelling of texts/ and ./texts; a hub id has but one."""
    return os.path.normpath(source)


def towers_config(model: str, denoiser_layers: str | None = None) -> TwoTowerConfig:
    """The config of the towers that `prepare` would give; a two-tower checkpoint may lack its weights. Raises
    SettingError for layers that the model has not."""
    try:
        single = not holds_two_towers(model)
    except FileNotFoundError:
        single = False
    config = open_backbone(model).config if single else read_config(resolve(model))
    if denoiser_layers is None:
        return config
    return dataclasses.replace(config, denoiser_layers=chosen_layers(config, denoiser_layers))


def _read(out: Path) -> _Made:
    file = out / _RECORD
    found: _Made = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _write(out: Path, made: _Made) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{_RECORD}.partial"
    partial.write_text(json.dumps(made), encoding="utf-8")
    os.replace(partial, out / _RECORD)
