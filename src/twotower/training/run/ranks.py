"""Several processes that train together: each takes its share of a step's rows."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size` and computes on `device`. More than one need a process group; see
    `joined`."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def share(self, num_rows: int) -> range:
        """Which of a step's rows are this rank's. Raises ValueError where the ranks' shares would differ in size:
        sharded parameters are gathered by all ranks at once, so that all must take equally many parts."""
        if num_rows % self.size:
            raise ValueError(f"batch_size is {num_rows} on {self.size} ranks, must be a multiple of {self.size}")
        each = num_rows // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every whole tensor by its sum over the ranks; of sharded ones that is done already."""
        if self.size > 1:
            works = [dist.all_reduce(t, async_op=True) for t in tensors if not isinstance(t, DTensor)]
            for work in works:
                work.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(rank: int, size: int, device: torch.device, *, init_method: str = "env://") -> Iterator[Ranks]:
    """Ranks with a process group while the context lasts: gloo, and NCCL for tensors on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, device)
    finally:
        dist.destroy_process_group()
