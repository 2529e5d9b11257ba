"""An engine whose towers are on two accelerators that only know shapes; prints what it would have waited for, as JSON.

test_devices.py runs this as a process of its own, because a kind of device can't be taken back. Tensors have a device,
a shape and no values: mixing two devices raises, and so does bringing a value to the host. What the host must know of a
step is made up.
"""

import json
import random
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from twotower.config import TwoTowerConfig
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.decoding.step import LaunchedStep
from twotower.engine import batches
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower


class Copies(TorchDispatchMode):
    """Notes where the host copies to or from a device and waits until that is done."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if getattr(tensor, "constant", None) is not None:
                tensor.constant = None  # else small ones are computed in earnest
        out = op(*args, **kwargs)
        names = [argument.name for argument in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        source = given.get("src", given.get("self"))
        if "non_blocking" in names and not given.get("non_blocking"):
            ends = source.device, out.device
            if ends[0] != ends[1] and "cpu" in {end.type for end in ends}:
                ours = [f for f in traceback.extract_stack() if "/twotower/" in f.filename]
                self.waits.add(f"{ours[-1].filename}:{ours[-1].lineno}")
        return out


def made_up(launched: Sequence[LaunchedStep]) -> list[Any]:
    """Zeros and ones in the shapes of the results: ids, counts, masks and probabilities may be either."""

    def fill(shape: Sequence[int]) -> Any:
        return [fill(shape[1:]) for _ in range(shape[0])] if shape else float(rng.random() < 0.3)

    reads.append(len(launched))
    return [fill(one.results.shape) for one in launched]


rng, reads = random.Random(0), []
batches.read = made_up
_setup_privateuseone_for_python_backend("absent")
with FakeTensorMode(), Copies() as copies:
    config = TwoTowerConfig(**json.loads(sys.argv[1]))
    model = TwoTower(config, context_device="absent:0", denoiser_device="absent:1").eval()
    limits = EngineConfig(state_bytes=1 << 20, snapshot_bytes=1 << 16, prompt_chunk=64, max_num_requests=12)
    made = Engine(model, limits)
    for i, mode in enumerate([*MODES, *MODES]):
        lengths = {"max_new_tokens": 6 + i % 3, "block_size": 5, "steps_per_block": 3}
        params = SamplingParams(mode=mode, **lengths, temperature=i % 2, top_k=9, seed=i)
        made.add([5, 6, 7, 8 + i], params)
    made.add([9] * 70, SamplingParams(mode="auto", max_new_tokens=8, allow_loss=True))
    finished = 0
    while made.has_work:
        finished += sum(event.result is not None for event in made.step())
json.dump({"finished": finished, "waits": sorted(copies.waits), "steps per read": max(reads)}, sys.stdout)
