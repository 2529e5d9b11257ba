"""generation_config.json: a checkpoint's end tokens and sampling defaults, as transformers keeps them."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.checkpoints.hf.config_file import CONFIG_FILE, read_object
from twotower.config import TwoTowerConfig
from twotower.model.sampling_defaults import LEAST_DIVISOR, MOST_REPETITION_PENALTY, SamplingDefaults

GENERATION_FILE = "generation_config.json"

_LENGTHS = ("max_new_tokens", "min_new_tokens")
# Settings that decoding does not have, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "diversity_penalty": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
}


def read_config(directory: Path) -> TwoTowerConfig:
    """The config of a two-tower directory. Raises FileNotFoundError without a config.json, ValueError for a bad one."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}; download it, or finish the interrupted write")
    return with_generation_ends(TwoTowerConfig.from_json(file), directory)


def with_generation_ends(config: TwoTowerConfig, directory: Path) -> TwoTowerConfig:
    """The config with the end tokens of the directory's generation_config.json, which win over config.json's as in
    transformers, and with its BOS token where config.json has none. Raises ValueError for a broken file."""
    raw = read_object(directory / GENERATION_FILE)
    changes: dict[str, Any] = {}
    ends = raw.get("eos_token_id")
    if ends is not None:
        changes["eos_token_id"] = tuple(ends) if isinstance(ends, list) else ends
    if config.bos_token_id is None and raw.get("bos_token_id") is not None:
        changes["bos_token_id"] = raw["bos_token_id"]
    listed = changes.get("eos_token_id", ())
    ids = [*(listed if isinstance(listed, tuple) else (listed,)), changes.get("bos_token_id", 0)]
    strange = [i for i in ids if not isinstance(i, int) or isinstance(i, bool)]
    if strange:
        raise ValueError(
            f"{directory / GENERATION_FILE} has the token id {strange[0]!r}, must be an integer; correct it"
        )
    return dataclasses.replace(config, **changes)


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """The sampling defaults of a directory's generation_config.json; none without one.

    `drafter`, which transformers doesn't have, names where mode `verified` has its drafts from. As in transformers, its
    temperature and filters count only with `do_sample`; without, texts are greedy. Its
    repetition penalty always counts. Warns of settings that decoding does not have. Raises ValueError for a value out
    of range.
    """
    file = directory / GENERATION_FILE
    raw = read_object(file)
    ignored = [f"{key}={raw[key]!r}" for key, unused in _UNUSED.items() if raw.get(key) not in unused]
    if ignored:
        warnings.warn(f"{file} asks for what decoding here does not have: {', '.join(ignored)}", stacklevel=3)
    longest = _number(file, raw, "max_new_tokens", least=1)
    most = None if longest is None else int(longest)
    repetition = _number(file, raw, "repetition_penalty", least=LEAST_DIVISOR, most=MOST_REPETITION_PENALTY)
    penalty = None if repetition == 1 else repetition
    drafter = raw.get("drafter")
    if drafter is not None and not isinstance(drafter, str):
        raise ValueError(f"{file} has drafter {drafter!r}, must be a text such as 'denoiser'; correct it")
    if not raw.get("do_sample"):
        greedy = 0.0 if raw.get("do_sample") is False else None
        return SamplingDefaults(temperature=greedy, max_new_tokens=most, repetition_penalty=penalty, drafter=drafter)
    temperature = _number(file, raw, "temperature", least=0, most=100)
    top_k, top_p = _number(file, raw, "top_k", least=-1), _number(file, raw, "top_p", least=0, most=1)
    typical_p = _number(file, raw, "typical_p", least=0, most=1)
    return SamplingDefaults(
        temperature=1.0 if temperature is None else temperature,
        # 0 and -1 are how other tools write "all", as is a probability of 1
        top_k=None if top_k is None or top_k < 1 else int(top_k),
        top_p=None if top_p in (None, 0, 1) else top_p,
        min_p=_number(file, raw, "min_p", least=0, most=1) or None,
        typical_p=None if typical_p in (None, 0, 1) else typical_p,
        max_new_tokens=most,
        repetition_penalty=penalty,
        drafter=drafter,
    )


def write_drafter(directory: Path, drafter: str) -> None:
    """Writes into a directory's generation_config.json where mode `verified` has its drafts from, and leaves the rest
    of it as it is."""
    file = directory / GENERATION_FILE
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**read_object(file), "drafter": drafter}, indent=2) + "\n")
    os.replace(partial, file)


def without_token_ids(content: bytes) -> bytes:
    """A generation_config.json without the ids of tokens, for a vocabulary in which they are other tokens."""
    raw = json.loads(content)
    kept = {key: v for key, v in raw.items() if not key.endswith(("_token_id", "_ids", "_tokens")) or key in _LENGTHS}
    return json.dumps(kept, indent=2).encode()


def _number(file: Path, raw: Mapping[str, Any], key: str, *, least: float, most: float = float("inf")) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{file} has {key} {value!r}, must be a number in [{least:g}, {most:g}]; correct it")
    return value
