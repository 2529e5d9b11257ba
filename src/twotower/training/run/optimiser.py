"""AdamW over float32 master weights, with their running mean, for a model whose own weights may be bfloat16."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Optimiser:
    """AdamW over float32 (or float64) master weights of the given parameters, by name.

    A parameter in float32 or float64 is its own master. A coarser one has its exact value in `exact[name]`, which
    becomes its master: gradients are added up there after each micro-batch, and the parameter is set to the rounded
    master after each update. `ema_decay` above 0 keeps a running mean of the masters. β₁ is 0.9 and β₂ is 0.98.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        exact: Mapping[str, Tensor],
        *,
        weight_decay: float,
        ema_decay: float,
    ) -> None:
        self.rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            master = parameter
            if name in exact:
                master = nn.Parameter(exact[name])
                parameter.register_post_accumulate_grad_hook(_collect_in(master))
                self.rounded.append((parameter, master))
            self.masters[name] = master
        # Two groups, because no PyTorch operation takes sharded and whole tensors together.
        sharded = [m for m in self.masters.values() if isinstance(m, DTensor)]
        groups = [sharded, [m for m in self.masters.values() if not isinstance(m, DTensor)]]
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in groups if group], betas=(0.9, 0.98), weight_decay=weight_decay
        )
        # AdamW itself makes its moments at its first step, but a state may be saved before.
        for master in self.masters.values():
            zeros = (torch.zeros_like(master.detach()) for _ in range(2))
            moments = dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
            self.adamw.state[master] = {"step": torch.zeros(()), **moments}
        self.ema_decay = ema_decay
        self.ema = {n: m.detach().clone() for n, m in self.masters.items()} if ema_decay > 0 else {}

    def gradients(self) -> list[Tensor]:
        """The gradients of the masters that have one."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def update(self, rate: float, max_norm: float, norm: float) -> None:
        """One AdamW step at learning rate `rate`, with gradients of total norm `norm` scaled down to `max_norm`."""
        if norm > max_norm:
            for gradient in self.gradients():
                gradient.mul_(max_norm / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.round_()

    @torch.no_grad()
    def average(self, num_updates: int) -> None:
        """Moves the running mean towards the masters: mean = decay · mean + (1 − decay) · master.

        The decay is min(`ema_decay`, (1 + n) / (10 + n)) after n updates, so that the initial weights soon leave the
        mean.
        """
        decay = min(self.ema_decay, (1 + num_updates) / (10 + num_updates))
        for name, mean in self.ema.items():
            mean.lerp_(self.masters[name], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model computes with the running mean of its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self.ema.items():
            kept = self.masters[name].detach().clone()
            self.masters[name].copy_(mean)
            mean.copy_(kept)
        self.round_()

    def clear(self) -> None:
        """Drops the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def round_(self) -> None:
        """Sets the model's coarser parameters to their masters, rounded."""
        for parameter, master in self.rounded:
            parameter.copy_(master)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a saved state, group -> name -> tensor; not copies."""
        state = {name: self.adamw.state[master] for name, master in self.masters.items()}
        found = {"weights": {name: master.detach() for name, master in self.masters.items()}}
        for part in ("exp_avg", "exp_avg_sq", "step"):
            found[part] = {name: values[part] for name, values in state.items()}
        return found | ({"ema": self.ema} if self.ema else {})


def total_norm(gradients: list[Tensor]) -> float:
    """The Euclidean norm of all gradients, sharded or not."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (sharded, whole) if part]
    parts = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    return parts[0].item() if len(parts) == 1 else torch.stack(parts).norm().item()


def _collect_in(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's new gradient to its master's: sums over micro-batches stay float32."""

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return collect
