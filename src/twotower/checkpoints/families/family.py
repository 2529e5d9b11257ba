"""What a family of backbones declares, and opening a model by its declaration. docs/families.md walks through one.

A family's model is a list of blocks, each of which becomes some of our layers: a Llama block is attention `*` and MLP
`-`. A declaration says how the block's settings and tensors are called.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone, tower_shapes
from twotower.checkpoints.families.settings import checked
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import TwoTowerConfig

# What makes our tensors of one of theirs: the name that it has here, or a function that is called with the tensor and
# "weight", "bias" or "" (what its name ends in, behind the name declared) and gives ours by their names.
#
# Names of a block's tensors begin with the index of the layer among those of the block, as in "1.mixer.up_proj". A name
# that ends in "[3]" is row 3 of a tensor that several of theirs make up.
Part = str | Callable[[Tensor, str], Mapping[str, Tensor]]
Parts = Mapping[str, Part]
Settings = Mapping[str, Any]

# Prefixes of the tensors of a model without its head, the longest first; a base model saved by itself has none.
_PREFIXES = (
    "model.language_model.",
    "model.text_model.",
    "language_model.model.",
    "language_model.",
    "model.decoder.",
    "decoder.",
    "model.",
    "transformer.",
    "gpt_neox.",
    "backbone.",
)
# How the names of what sees, hears or predicts further tokens begin in models whose decoder we take
_SENSES = re.compile(
    r"(vision|visual|image|audio|multi_modal|mm_projector|connector|embed_vision|embed_audio|aligner|mtp\.)"
)
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ROW = re.compile(r"(.*)\[(\d+)\]")


class TensorSource(Protocol):
    """The tensors of a model under its family's names."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a config.json and the tensors beside it are ours.

    `fields` gives the fields of `TwoTowerConfig` for the content of a config.json, in which missing keys have the
    values that transformers gives them; it may raise ValueError for a setting that our towers don't compute. `block`
    gives for the config and the config.json what becomes of each tensor of a block, `rest` what becomes of the others,
    by the name without the prefix (such as "model.layers.0.") and without ".weight" or ".bias". `zeros` are names of
    our tensors, by their ends, that are zeros where the model has none, and `ones` of those that are ones. Tensors
    whose names match `ignored` follow from the settings. `mask_token_id` is a token that the family keeps free.
    """

    model_types: tuple[str, ...]
    fields: Callable[[Settings], Mapping[str, Any]]
    block: Callable[[TwoTowerConfig, Settings], Parts]
    rest: Parts
    layers_name: str = "layers"
    zeros: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    ignored: str = r"rotary_emb\.inv_freq$"
    mask_token_id: int | None = None


def open_family(
    family: Family, raw: Settings, source: TensorSource, tokenizer: str | None, documents: Mapping[str, bytes]
) -> Backbone:
    """The model of a family whose config.json is `raw`. Reads headers only.

    Raises ValueError for a setting under which the model computes something that our towers don't.
    """
    raw = checked(raw)
    for key in _DEPTHS:
        if raw.get(key, 0) > len(source.specs):  # as many layers take long to refuse
            raise ValueError(
                f"config.json has {key} {raw[key]}, but there are only {len(source.specs)} tensors; "
                "both must come from one model"
            )
    config = _config(family, raw)
    names = _Names(family, config, raw, tuple(source.specs))
    specs = names.specs(source.specs)
    filled = {
        name: TensorSpec(specs["embeddings.weight"].dtype, shape)
        for name, shape in tower_shapes(config).items()
        if name not in specs and name.endswith(family.zeros + family.ones) and "embeddings.weight" in specs
    }

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from names.stream(source, specs)
        for name, spec in filled.items():
            yield name, torch.full(spec.shape, float(name.endswith(family.ones)), dtype=spec.dtype)

    return Backbone(
        config=config,
        specs=specs | filled,
        stream=stream,
        tokenizer=tokenizer,
        documents=documents,
        mask_token_id=family.mask_token_id,
        skipped=tuple(names.skipped),
    )


def _config(family: Family, raw: Settings) -> TwoTowerConfig:
    kept = ("torch_dtype", "dtype", "pad_token_id", "max_position_embeddings")
    positions = next((raw[key] for key in ("n_positions", "max_seq_len", "seq_length") if raw.get(key)), None)
    named = {"max_position_embeddings": positions, **raw}
    carried = {key: named[key] for key in kept if named.get(key) is not None}
    known = {"architectures": ["NemotronHTwoTowerForCausalLM"], "model_type": "nemotron_h"}
    eos = raw.get("eos_token_id")
    values = {
        "vocab_size": need(raw, "vocab_size"),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "carried": known | carried,
        **family.fields(raw),
    }
    try:
        return TwoTowerConfig(**values)
    except ValueError as error:
        raise ValueError(f"config.json describes no model that our towers can be: {error}") from error


def need(raw: Settings, *keys: str) -> Any:
    """The value of the first of `keys` in a config.json that is not null. Raises ValueError where there is none."""
    found = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if found is None:
        raise ValueError(f"config.json lacks {' or '.join(keys)}, which {raw.get('model_type')!r} models need")
    return found


def whole(raw: Settings, key: str, default: int | None = None, *, least: int = 1) -> int:
    """The whole number that a key of config.json has, `default` where it is missing or null; without a default it must
    be there. Raises ValueError for anything else, or less than `least`."""
    value = need(raw, key) if default is None or raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json has {key} {value!r}, must be a whole number of at least {least}; correct it")
    return value


class _Names:
    """Which of a model's tensors become which of ours."""

    def __init__(self, family: Family, config: TwoTowerConfig, raw: Settings, names: tuple[str, ...]) -> None:
        self.block = family.block(config, raw)
        self.rest = family.rest
        counts = (raw.get(key) for key in _DEPTHS)
        num_blocks = next((count for count in counts if count), config.num_layers)
        self.per_block = config.num_layers // num_blocks
        # Their name -> the part, the suffix, and the first of our layers of the block
        self.found: dict[str, tuple[Part, str, int | None]] = {}
        self.skipped: list[str] = []
        self.unknown: list[str] = []
        place = re.compile(rf"{re.escape(family.layers_name)}\.(\d+)\.(.*)")
        ignored = re.compile(family.ignored)
        for name in names:
            short = name.removeprefix(next((p for p in _PREFIXES if name.startswith(p)), ""))
            if ignored.search(short) or (short == "lm_head.weight" and config.tie_word_embeddings):
                continue
            inside = place.fullmatch(short)
            if _SENSES.match(short) or (inside is not None and int(inside[1]) >= num_blocks):
                self.skipped.append(name)
            else:
                parts, inner = (self.rest, short) if inside is None else (self.block, inside[2])
                found = _part(parts, inner)
                if found is None:
                    self.unknown.append(name)
                else:
                    self.found[name] = (*found, None if inside is None else int(inside[1]) * self.per_block)

    def specs(self, theirs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The dtype and shape of each of our tensors. Undeclared ones keep their names, which the check of names will
        then report."""
        rows: dict[str, int] = {}
        specs = {name: theirs[name] for name in self.unknown}
        for name in self.found:
            dtype, shape = theirs[name]
            try:
                made = self._made(name, torch.empty(shape, dtype=dtype, device="meta"))
            except (RuntimeError, ValueError) as error:  # parts that don't fit the shape
                raise ValueError(f"{name} of shape {shape} is not what config.json describes: {error}") from error
            for ours, tensor in made.items():
                row = _ROW.fullmatch(ours)
                ours = ours if row is None else row[1]
                rows[ours] = rows.get(ours, 0) + (row is not None)
                stacked = (rows[ours],) if rows[ours] else ()
                specs[ours] = TensorSpec(tensor.dtype, (*stacked, *tensor.shape))
        return specs

    def stream(self, source: TensorSource, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """Each of our tensors once."""
        stacks: dict[str, dict[int, Tensor]] = {}
        for name, tensor in source.stream(self.found):
            for ours, made in self._made(name, tensor).items():
                row = _ROW.fullmatch(ours)
                if row is None:
                    yield ours, made
                    continue
                stack = stacks.setdefault(row[1], {})
                stack[int(row[2])] = made
                if len(stack) == specs[row[1]].shape[0]:
                    yield row[1], torch.stack([stack[i] for i in range(len(stack))])

    def _made(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        part, suffix, first = self.found[name]
        if isinstance(part, str):
            made: Mapping[str, Tensor] = {f"{part}.{suffix}" if suffix else part: tensor}
        else:
            made = part(tensor, suffix)
        if first is None:
            return dict(made)
        placed = {}
        for ours, value in made.items():
            layer, rest = ours.split(".", 1)
            placed[f"layers.{first + int(layer)}.{rest}"] = value
        return placed


def _part(parts: Parts, name: str) -> tuple[Part, str] | None:
    """The part declared for a tensor's short name and what follows its declared name; None if it isn't declared."""
    if name in parts:
        return parts[name], ""
    stem, _, suffix = name.rpartition(".")
    return (parts[stem], suffix) if suffix in ("weight", "bias") and stem in parts else None
