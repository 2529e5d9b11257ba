"""Sampling a corpus from the frozen context tower itself. Letters: b rows, t tokens."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.config import TwoTowerConfig
from twotower.decoding.prompt import check_prompts, checked_ids
from twotower.decoding.sampling import inverse_sample
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower
from twotower.options import check_options, option
from twotower.training.corpus.row_length import check_row_length, past_positions_option, usual_length
from twotower.training.corpus.shards import CorpusRows, write_shard

SETTINGS_FILE = "settings.json"
_USUAL_LENGTH = 256
_SHORTEST_PREFIX, _LONGEST_PREFIX = 6, 159


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the shards of a corpus hold: `rows` rows of `length` tokens each; None is 256, or the model's positions if
    it has fewer.

    A row that no prompt begins is sampled at temperature 1 up to a prefix, then at one of `temperatures`, drawn per
    shard with equal chances (so (0, 0, 0, 1) makes three shards of four greedy). The prefix, whose length is drawn per
    shard from [`shortest_prefix`, `longest_prefix`], gives variety and is not scored in training; with temperature 1
    all is.
    """

    rows: int = option(512, "Rows of a shard, written as one batch.", least=1)
    length: int | None = option(
        None, "Tokens of a row.", least=2, shown_default=f"{_USUAL_LENGTH}, or the model's positions if it has fewer"
    )
    past_positions: bool = past_positions_option()
    temperatures: tuple[float, ...] = option(
        (0.0, 0.0, 0.0, 1.0),
        "With commas: each shard draws one for what follows the prefix or the prompts; 0 is greedy.",
        least=0,
        most=100,
    )
    shortest_prefix: int | None = option(
        None,
        "Fewest tokens sampled at temperature 1 before that; not with --prompts.",
        least=1,
        shown_default=f"{_SHORTEST_PREFIX}",
    )
    longest_prefix: int | None = option(
        None, "Most of them, below --length; not with --prompts.", least=1, shown_default=f"{_LONGEST_PREFIX}"
    )
    seed: int = option(0, "Decides every shard.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.temperatures:
            raise SettingError("temperatures", self.temperatures, "one number or more")
        self.prefixes(self.length or _USUAL_LENGTH)

    def row_length(self, model: TwoTowerConfig) -> int:
        """The length of rows for a model. Raises SettingError for one beyond its positions, unless `past_positions`."""
        if self.length is None:
            return usual_length(_USUAL_LENGTH, model)
        check_row_length("length", self.length, model, self.past_positions)
        return self.length

    def prefixes(self, length: int) -> tuple[int, int]:
        """The shortest and the longest prefix in rows of `length` tokens; those that are not given are 6 and 159, or
        what a row holds. Raises SettingError for those that don't fit a row or each other."""
        longest = min(_LONGEST_PREFIX, length - 1) if self.longest_prefix is None else self.longest_prefix
        shortest = min(_SHORTEST_PREFIX, longest) if self.shortest_prefix is None else self.shortest_prefix
        if longest >= length:
            raise SettingError("longest_prefix", longest, f"below length, which is {length}")
        if shortest > longest:
            raise SettingError("shortest_prefix", shortest, f"at most longest_prefix, which is {longest}")
        return shortest, longest


class Sampled(NamedTuple):
    """Token ids (b, t) int64, and the length (b,) int64 of each row's text with its end token; padding follows."""

    ids: Tensor
    lengths: Tensor


@torch.inference_mode()
def sample_rows(
    model: TwoTower,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    prefix: int,
    seed: int,
    temperature: float = 0.0,
) -> Sampled:
    """Continues each prompt up to an end token or `length` tokens, at temperature 1 before position `prefix` and at
    `temperature` from there on; 0 is greedy.

    A greedy continuation is a function of its prefix, which a denoiser can learn; the sampled prefix gives variety. The
    mask token and the tokenizer's unknown token are never drawn. Raises SettingError for a prefix outside [1, length]
    and for prompts that are not lists of this vocabulary's ids, and ValueError for one that is empty or too long.

    This loop is not that of mode `ar`, because shards must stay reproducible: it takes one draw per row and position
    from a single generator, given positions included, where decoding names each draw by its row's own seed.
    """
    check_prompts(prompts)
    if not 1 <= prefix <= length:
        raise SettingError("prefix", prefix, f"in [1, length={length}]")
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, f"prompt {number}", model.config.vocab_size, length)
    generator = torch.Generator().manual_seed(seed)
    device, b = model.context_device, len(prompts)
    given = torch.tensor([[*p, *[-1] * (length - len(p))] for p in prompts], device=device)  # (b, t), -1 to be drawn
    banned = _unknown(model)
    ends = torch.tensor(model.config.eos_token_ids, dtype=torch.int64, device=device)
    ids = given[:, :1]
    state = model.absorb(ids, model.context_tower.initial_state(b, length), with_logits=True)
    columns = [ids]
    ended = torch.zeros(b, 1, dtype=torch.bool, device=device)
    lengths = torch.ones(b, dtype=torch.int64, device=device)
    for position in range(1, length):
        assert state.next_logits is not None
        logits = state.next_logits
        logits[:, banned] = -torch.inf
        heat = 1.0 if position < prefix else temperature
        if heat > 0:
            draws = torch.rand(b, 1, generator=generator).to(device)
            drawn = inverse_sample((logits / heat).softmax(-1).unsqueeze(1), draws)
        else:
            drawn = logits.argmax(-1, keepdim=True)
        own = given[:, position : position + 1]
        ids = torch.where(own < 0, drawn, own).masked_fill(ended, padding_token(model))
        columns.append(ids)
        lengths += ~ended[:, 0]
        ended |= torch.isin(ids, ends) & (own < 0)
        if bool(ended.all()):
            break
        if position + 1 < length:
            state = model.absorb(ids, state, with_logits=True)
    found = torch.cat(columns, dim=1)
    return Sampled(F.pad(found, (0, length - found.shape[1]), value=padding_token(model)), lengths)


def beginnings(model: TwoTower, rows: int) -> list[list[int]]:
    """`rows` prompts that consist of BOS. Raises ValueError for a model without BOS."""
    if model.config.bos_token_id is None:
        raise ValueError("the config has no bos_token_id to start rows with; set it in config.json, or give prompts")
    return [[model.config.bos_token_id]] * rows


def padding_token(model: TwoTower) -> int:
    """The token that fills a row up after its text, never scored: BOS, or token 0."""
    return model.config.bos_token_id or 0


def check_prompt(prompt: Sequence[int], name: str, vocab_size: int, length: int) -> None:
    """Raises ValueError, calling the prompt `name`, unless it has 1 to length − 1 tokens of the vocabulary."""
    if not 1 <= len(prompt) < length:
        raise ValueError(f"{name} has {len(prompt)} tokens, must have 1 to {length - 1}, below length={length}")
    checked_ids(prompt, vocab_size, name)


def _unknown(model: TwoTower) -> list[int]:
    """The tokenizer's unknown token in a list, or an empty list if it has none or it is also an end token."""
    if model.tokenizer is None:
        return []
    raw = json.loads(model.tokenizer.to_str())["model"]
    name = raw.get("unk_token")
    token = raw.get("unk_id") if name is None else model.tokenizer.token_to_id(name)
    return [] if token is None or token in model.config.eos_token_ids else [token]


def sample_shard(
    model: TwoTower, folder: Path, index: int, config: SampleConfig, prompts: Sequence[Sequence[int]] | None = None
) -> Path:
    """Samples shard `index` into `folder` as `{index:05d}.safetensors`, unless it exists, and returns its path.

    With `prompts`, the shard's rows continue its share of them, `config.rows` per shard; prompts are never scored, nor
    are the sampled prefixes, except at temperature 1, nor padding. The shard depends on (config, index, prompts) alone.
    It is written under another name and renamed, so that a kill leaves no incomplete shard under its name. Raises
    SettingError for rows longer than the model's positions unless `config.past_positions`.
    """
    length = config.row_length(model.config)
    shortest, longest = config.prefixes(length)
    file = folder / f"{index:05d}.safetensors"
    if file.exists():
        return file
    rng = np.random.default_rng((config.seed, index))
    temperature = float(rng.choice(config.temperatures))
    prefix = int(rng.integers(shortest, longest + 1))
    seed = int(rng.integers(2**62))
    if prompts is None:
        own: Sequence[Sequence[int]] = beginnings(model, config.rows)
    else:
        own, prefix = prompts[index * config.rows : (index + 1) * config.rows], 1
    found = sample_rows(model, own, length=length, prefix=prefix, seed=seed, temperature=temperature)
    ids, lengths = found.ids.cpu().numpy(), found.lengths.cpu().numpy()[:, None]
    place = np.arange(length)  # (t,)
    starts = np.array([[len(prompt)] for prompt in own])
    if temperature != 1:
        starts = np.maximum(starts, prefix)
    rows = CorpusRows(ids, (place >= starts) & (place < lengths), place >= lengths)
    write_shard(file, rows, model.tokenizer)
    return file


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings that shards are sampled with into their folder. Raises ValueError where the folder holds
    shards that were sampled with other settings, or with settings that are not recorded."""
    file = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds shards but no {SETTINGS_FILE} saying how; choose a new directory")
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=1))
        os.replace(partial, file)
        return
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); choose a new directory") from error
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        was, now = (", ".join(f"{n} {v.get(n)!r}" for n in names) for v in (found, wanted))
        raise ValueError(f"{folder} was begun with {was}, not {now}; give the same again, or choose a new directory")
