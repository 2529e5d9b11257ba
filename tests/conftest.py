"""Tiny random models, the golden cases and a byte tokenizer."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import twotower
from twotower.config import TwoTowerConfig
from twotower.model.two_tower import TwoTower

# One thread: the tensors are tiny, and sums in one order make runs comparable to the last bit.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "eos_token_id": None,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_state_size": 8,
    "mamba_num_groups": 2,
    "mamba_dt_rank": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
LLAMA: dict[str, Any] = {
    "pattern": "*-*-",
    "use_rope": True,
    "gated_mlp": True,
    "mlp_hidden_act": "silu",
    "tie_word_embeddings": True,
}


def fill(model: TwoTower, seed: int) -> None:
    """Reproducible weights that keep activations near 1 and logits spread enough for confidences all over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    peaked = 3 * model.config.hidden_size**-0.5
    for name, tensor in sorted(model.released_tensors().items()):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            value = 1 + 0.1 * noise
        elif name.endswith("A_log"):
            value = (0.5 + 4 * uniform).log()
        elif name.endswith("recurrent_param"):
            value = uniform * 3 - 5  # decays from 0.6 to 0.97
        elif name.endswith("dt_bias"):
            value = uniform * 3 - 4  # dt from 0.02 to 0.3: states remember tens of tokens
        elif name.startswith("scale_shift_tables"):
            value = 0.2 * noise
            value[2] += 1  # gate
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif name.endswith("conv1d.weight"):
            value = 0.5 * noise
        elif name.endswith("embeddings.weight"):
            value = noise * (peaked if model.config.tie_word_embeddings else 1)
        elif name.endswith("lm_head.weight"):
            value = noise * peaked
        elif name == "t_block.1.weight":
            value = 0.3 * noise * tensor.shape[-1] ** -0.5
        else:
            # twice: sharp attention, and layers that outweigh the embedding of the token itself
            loud = name.endswith(
                ("q_proj.weight", "k_proj.weight", "o_proj.weight", "out_proj.weight", "down_proj.weight")
            )
            value = noise * tensor.shape[-1] ** -0.5 * (2 if loud else 1)
        tensor.copy_(value)


@pytest.fixture(scope="session")
def cxx_compiler() -> None:
    """For tests of torch.compile, which writes C++."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("this machine has no C++ compiler")


@pytest.fixture(scope="session")
def sizes() -> dict[str, Any]:
    """What `tiny` gives a config beside its pattern."""
    return dict(SIZES)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TwoTower]:
    """tiny("M*-E", dtype=…, seed=…, **config) makes a small random model; tiny("llama") a Llama-family one."""

    def make(pattern: str = "M*-E", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> TwoTower:
        kind = LLAMA if pattern == "llama" else {"pattern": pattern}
        model = TwoTower(TwoTowerConfig(**(SIZES | kind | overrides)), dtype=dtype)
        with torch.no_grad():
            fill(model, seed)
        return model.eval()

    return make


class Golden(NamedTuple):
    """A model in the released layout, and what the released code computed from it."""

    model: TwoTower
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


@pytest.fixture(scope="session")
def golden() -> Callable[..., Golden]:
    """golden("hybrid" or "dense", None for an unpacked model or a packed one's backend)"""
    cases: dict[tuple[str, str | None], Golden] = {}

    def load(case: str, backend: Literal["reference", "native"] | None = None) -> Golden:
        if (case, backend) not in cases:
            folder = GOLDEN / case
            settings = json.loads((folder / "golden.json").read_text())
            model = twotower.load(folder, pack=backend is not None, backend=backend)
            tensors = load_file(folder / "golden.safetensors")
            for name in tensors:
                if name.endswith("logits"):  # there the mask token, which nothing may propose, has any logit
                    tensors[name][..., model.config.mask_token_id] = -torch.inf
            cases[case, backend] = Golden(model, tensors, settings)
        return cases[case, backend]

    return load


@pytest.fixture(scope="session")
def ids() -> Callable[..., Tensor]:
    """ids(b, t) of reproducible tokens that are neither special nor masks."""

    def make(batch: int, length: int, *, vocab_size: int = SIZES["vocab_size"], seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * length + batch)
        return torch.randint(4, vocab_size, (batch, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> tokenizers.Tokenizer:
    """Four control tokens, then the 256 bytes in order: token 4 + n is byte n."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    vocabulary |= {symbol: 4 + value for value, symbol in enumerate(_byte_symbols())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<mask>"])
    return tokenizer


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(value) if value in plain else chr(next(rest)) for value in range(256)]


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Asserts that a tensor is within a fraction of the expected one's largest magnitude, and −∞ where that is: in the
    logits of the mask token."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        assert actual.shape == expected.shape
        there = expected != -torch.inf
        assert torch.equal(actual != -torch.inf, there)
        actual, expected = actual[there], expected[there]
        assert bool(actual.isfinite().all())
        largest = expected.double().abs().max().item() if expected.numel() else 0.0
        error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert error <= tolerance * largest, (
            f"off by {error:.3g}, {error / max(largest, math.ulp(0)):.3g} of the largest"
        )

    return check


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls so far that brought a tensor's value to the host: each would wait for a GPU to have done
    all that it was asked to do before."""
    names: list[str] = []

    def counted(name: str, reader: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            names.append(name)
            return reader(*arguments, **keywords)

        return call

    readers = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__iter__")
    for name in readers:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return names


class Fit(NamedTuple):
    """A chi-square test's p-value and degrees of freedom."""

    p_value: float
    degrees: int


@pytest.fixture(scope="session")
def chi_square() -> Callable[[Counter, dict[Any, float], int], Fit]:
    """chi_square(counts, expected, num) tests counts of `num` draws against the probabilities that are expected."""

    def check(counts: Counter, expected: dict[Any, float], num: int) -> Fit:
        # cells that expect fewer than 5 are one cell
        large = {k: e * num for k, e in expected.items() if e * num >= 5}
        cells = [(counts[k], e) for k, e in large.items()]
        rest = num - sum(large.values())
        if rest > 1e-6 * num:
            cells.append((num - sum(c for c, _ in cells), rest))
        statistic = sum((c - e) ** 2 / e for c, e in cells)
        half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
        return Fit(torch.special.gammaincc(half[0], half[1]).item(), len(cells) - 1)

    return check
