"""Several processes that train together (ranks), each on its share of a step's rows."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from twotower.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`, from 0, and computes on `device`. More than one need a process group,
    which `joined` makes."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def share(self, num_rows: int) -> range:
        """The numbers of the rows of a step, out of `num_rows`, that this rank takes.

        Raises SettingError where the ranks' shares would differ in size: gathering sharded parameters takes all ranks
        together, so that all must compute equally many micro-batches.
        """
        if num_rows % self.size:
            raise SettingError("batch_size", num_rows, f"a multiple of {self.size}, the number of ranks")
        each = num_rows // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, found: bool) -> bool:
        """Whether `found` is true on any rank."""
        return self.total([float(found)])[0] > 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks. Sharded ones are left out: FSDP has summed them already."""
        if self.size > 1:
            works = [dist.all_reduce(t, async_op=True) for t in tensors if not isinstance(t, DTensor)]
            for work in works:
                work.wait()

    def wait(self) -> None:
        """Returns once all ranks have called it."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(rank: int, size: int, device: torch.device, *, init_method: str = "env://") -> Iterator[Ranks]:
    """A context with a process group: gloo, and NCCL for tensors on a GPU. `init_method` is torch.distributed's; by
    default the environment variables that torchrun sets."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, device)
    finally:
        dist.destroy_process_group()
