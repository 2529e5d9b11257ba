"""Which layers of a context tower are quantised: the names in quantization_config are the checkpoint's, vLLM asks for
its own."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from twotower.checkpoints.hf.two_towers import released_shapes
from twotower.config import TwoTowerConfig

# Lists of layers, as the classes of vLLM that read quantization_config keep them: those that are not quantised, in
# compressed-tensors, FP8, ModelOpt and AWQ, and those of GPTQ that are
_LEFT_OUT = ("ignore", "ignored_layers", "exclude_modules", "modules_to_not_convert")
_QUANTISED = "modules_in_block_to_quantize"
# Settings by layer: of compressed-tensors, where a key may also be a class of modules, and of ModelOpt
_BY_LAYER = ("target_scheme_map", "quantized_layers")
# Settings of GPTQ by regular expression, which "-:" before it leaves out
_BY_PATTERN = "dynamic"
_REGEX = "re:"


class ContextLayers:
    """The layers of a context tower with a weight that may be quantised: name in the checkpoint -> name in vLLM.

    `fused` has what vLLM calls several of them together: its name -> theirs in vLLM.
    """

    def __init__(self, config: TwoTowerConfig, fused: Mapping[str, Iterable[str]]) -> None:
        layers = [
            name.removesuffix(".weight")
            for name, shape in released_shapes(config).items()
            if name.startswith("context_") and name.endswith(".weight") and len(shape) > 1
        ]
        self._names = {name: _vllm_name(name) for name in layers}
        self._together: dict[str, set[str]] = {}
        for name in self._names.values():
            before, _, last = name.rpartition(".")
            for one, parts in fused.items():
                if last in parts:
                    self._together.setdefault(f"{before}.{one}", set()).add(name)
            experts, found, _ = name.partition(".experts.")
            if found:
                self._together.setdefault(f"{experts}.experts", set()).add(name)

    def named(self, entry: str) -> list[str]:
        """vLLM's names of the layers that an entry of quantization_config means, in the tower's order: a name, a part
        of one such as "mixer.in_proj", a pattern with *, or "re:" and a regular expression."""
        return self._with_fused([ours for name, ours in self._names.items() if _means(entry, name)])

    def matched(self, pattern: str) -> list[str]:
        """The same for a regular expression that a name begins with."""
        return self.named(_REGEX + pattern)

    def _with_fused(self, found: list[str]) -> list[str]:
        there = set(found)
        return found + [name for name, parts in self._together.items() if parts <= there]


def rename_layers_(quantisation: Any, layers: ContextLayers) -> None:
    """Puts vLLM's names of the context tower's layers into vLLM's reading of quantization_config. What is said of the
    denoiser goes: its head has the name that vLLM has for the context tower's."""
    for key in _LEFT_OUT:
        entries = getattr(quantisation, key, None)
        if entries:
            setattr(quantisation, key, [name for entry in entries for name in layers.named(entry)])
    chosen = getattr(quantisation, _QUANTISED, None)
    if chosen:
        # An empty list would mean all
        names = [name for entry in chosen for name in layers.named(entry)]
        setattr(quantisation, _QUANTISED, names or [entry for entry in chosen if entry.startswith("denoiser_tower.")])
    for key in _BY_LAYER:
        settings = getattr(quantisation, key, None)
        if settings:
            named = {name: value for entry, value in settings.items() for name in _layers_or_class(layers, entry)}
            setattr(quantisation, key, named)
    dynamic = getattr(quantisation, _BY_PATTERN, None)
    if dynamic:
        named = {}
        for pattern, value in dynamic.items():
            sign, _, rest = pattern.rpartition(":") if pattern[:2] in ("-:", "+:") else ("+", "", pattern)
            named |= {f"{sign[:1]}:{re.escape(name)}$": value for name in layers.matched(rest)}
        setattr(quantisation, _BY_PATTERN, named)


def _layers_or_class(layers: ContextLayers, entry: str) -> list[str]:
    is_class = "." not in entry and not entry.startswith(_REGEX)
    return layers.named(entry) or ([entry] if is_class and not entry.endswith("lm_head") else [])


def _vllm_name(name: str) -> str:
    if name == "context_lm_head":
        return "lm_head"
    return "model." + name.removeprefix("context_tower.").replace("embeddings", "embed_tokens")


def _means(entry: str, name: str) -> bool:
    if entry.startswith(_REGEX):
        return re.match(entry.removeprefix(_REGEX), name) is not None
    if entry.endswith("*") and not entry.endswith(".*") and len(entry) > 1:
        # ModelOpt's way to leave out a module with all that it has: layers.1* is not layers.10.
        tree = entry.removesuffix("*")
        return fnmatchcase(name, tree) or fnmatchcase(name, tree + ".*")
    if any(c in entry for c in "*?["):
        return fnmatchcase(name, entry)
    return f".{entry}." in f".{name}."
