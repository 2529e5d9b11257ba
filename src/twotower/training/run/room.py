"""Whether a step's rows fit into memory, asked before the first step: later on the system ends the process unasked."""

import dataclasses
import warnings

from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.planning.machine import device_memory, in_words
from twotower.training.config import DenoisingConfig, NextTokenConfig, TrainConfig
from twotower.training.run.estimate import Memory, estimate
from twotower.training.run.ranks import Ranks

# Peaks of activations on CPUs were 0.95 to 1.7 times their estimate.
_LEAST, _MOST = 0.95, 1.7
# Bytes of each token of a step's rows with their masks, beside what is computed of them; 92 to 230 were measured.
_ROW_BYTES = 92


def check_room(
    config: TwoTowerConfig,
    run: TrainConfig,
    what: DenoisingConfig | NextTokenConfig,
    ranks: Ranks,
    *,
    row_length: int,
) -> None:
    """Raises SettingError where a step surely needs more memory than this rank's device has free, and warns where it
    may, with how many rows at a time would fit. Weights, moments and running mean are in memory already.

    Of the host's memory alone: on a GPU PyTorch raises an error itself, and what a step needs there was not measured.
    """
    if ranks.device.type != "cpu":
        return

    def memory(rows: int) -> Memory:
        few = dataclasses.replace(run, batch_size=rows * ranks.size, micro_batch_size=0)
        return estimate(config, few, what, row_length=row_length, num_ranks=ranks.size).memory

    device, share = device_memory(ranks.device), len(ranks.share(run.batch_size))
    rows = min(run.micro_batch_size or share, share)
    one = memory(1)
    each = memory(2).activations - one.activations
    kept, computed = one.gradients + share * row_length * _ROW_BYTES, one.activations + (rows - 1) * each
    if kept + _MOST * computed <= device.free:
        return
    fitting = min(int((device.free - kept) / _MOST - one.activations) // each + 1, rows - 1)
    fix = "fewer or shorter rows, recompute (--recompute) or bf16 (--bf16) need less"
    if fitting > 0:
        fix = f"micro_batch_size (--micro-batch-size) {fitting:,} gives the same in parts that fit"
    needed = (
        f"a step over {rows:,} rows of {row_length:,} tokens at a time needs about {in_words(int(kept + computed))}"
    )
    told = f"{needed}, and {in_words(device.free)} of {device.name} are free"
    if kept + _LEAST * computed > device.free:
        name = "batch_size" if rows == share else "micro_batch_size"
        raise SettingError(name, getattr(run, name), "less", f"{told}; {fix}")
    warnings.warn(f"{told}, which may be too little: the system then ends the run; {fix}", stacklevel=3)
