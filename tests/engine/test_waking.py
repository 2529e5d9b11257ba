"""Between two passes greedy decoding runs no operation for which PyTorch wakes its threads on a CPU: these then hold a
core for milliseconds that the C kernels' threads need."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import twotower
from twotower.backends.native import build

# A vector library takes threads for however few numbers.
LIBRARY = {"exp", "log", "sin", "cos", "tan", "tanh", "erf", "log10"}
INDEXED = 3000  # numbers from which on `index` takes threads
GRAIN = 32768  # and others
REDUCTIONS = {"max", "amax", "argmax", "sum", "topk", "logsumexp"}


class Waking(TorchDispatchMode):
    """Counts operations that wake threads, by name and size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [a for a in args if isinstance(a, Tensor)]
        if isinstance(result, Tensor) and not _computes_nothing(name, result, given):
            size = result.numel()
            if name == "cat":  # which copies its parts one by one
                size = max((part.numel() for part in args[0]), default=0)
            if name in REDUCTIONS:
                size = given[0].numel()
            if name in LIBRARY or size >= (INDEXED if name == "index" else GRAIN):
                key = f"{name} {tuple(result.shape)}"
                self.found[key] = self.found.get(key, 0) + 1
        return result


def _computes_nothing(name: str, result: Tensor, given: list[Tensor]) -> bool:
    """Whether it is a view of what was given, or memory that nothing was written to."""
    shared = any(result.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in given)
    return name.endswith(("empty", "empty_like")) or (shared and not name.endswith("_"))


@pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")
@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
@pytest.mark.parametrize("name", [None, "hybrid"])
def test_rounds_of_many_requests_wake_no_threads(name: str | None, mode: Any) -> None:
    """Requests of several lengths join and leave between rounds, so that batches are selected, joined and put."""
    model = twotower.load(name)
    config = twotower.EngineConfig(max_num_requests=9, state_bytes=96 << 20, snapshot_bytes=0)
    engine = twotower.Engine(model, config)
    prompts = [[1, *range(5, 9 + 2 * n)] for n in range(13)]
    params = [twotower.SamplingParams(mode=mode, max_new_tokens=8 + 4 * n, ignore_eos=True) for n in range(13)]
    assert INDEXED <= 9 * 16 * 24  # blocks of all rows in the table of stories' positions
    engine.generate(prompts, params)  # makes the tables of positions
    with Waking() as waking:
        results = engine.generate(prompts, params)
    assert [len(r.token_ids) for r in results] == [p.max_new_tokens for p in params]
    # the first round of `verified` puts the prompt's logits before its own
    found = {key for key in waking.found if not (mode == "verified" and key.startswith("cat "))}
    assert not found


def test_what_wakes_threads_is_found() -> None:
    table, logits = torch.zeros(512, 1, 24), torch.zeros(8, 6144)
    with Waking() as waking:
        table[0, 0].exp()
        table[torch.zeros(8, 16, dtype=torch.long)]
        logits.sum(-1)
        logits + 1
        torch.cat((logits, logits))
        logits.to(torch.float32)
        torch.cat(logits.split(1))
        table[:8].neg()
    assert {key.split()[0] for key in waking.found} == {"exp", "index", "sum", "add", "cat"}
    assert set(waking.found.values()) == {1}
