"""The `E` mixer: a mixture of experts. Letters: b batch, s tokens, d width, l width of an expert's input (d, or the
latent width), e experts, f expert width."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.mlp import MLP, plain_activation
from twotower.ops.linear import linear
from twotower.ops.moe import ExpertWeights, Routing, apply_experts, route


class MixtureOfExperts(nn.Module):
    """Routed experts, stacked, and where the config has one a shared expert that always runs.

    y = latent_out(Σ weight · expert(latent_in(x))) + sigmoid(shared_gate · x) · shared(x), each part where it exists.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        e, f, d, latent = (
            config.num_experts,
            config.expert_intermediate_size,
            config.hidden_size,
            config.moe_latent_size,
        )
        inputs, self.names = latent or d, ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
        # float32 in every model: the router computes in float64 and its choices must not depend on the dtype
        exact = torch.promote_types(dtype, torch.float32)
        self.gate = nn.Parameter(torch.empty(e, d, dtype=exact))
        self.gate_bias = nn.Parameter(torch.empty(e, dtype=exact)) if config.router_bias else None
        self.correction_bias = nn.Parameter(torch.empty(e, dtype=exact))
        # Both with l last: an expert's slice and the product over all experts then need no copy.
        self.up = nn.Parameter(torch.empty(e, f * len(self.names), inputs, dtype=dtype))
        self.down = nn.Parameter(torch.empty(e, f, inputs, dtype=dtype))
        biased = config.mlp_bias
        self.up_bias = nn.Parameter(torch.empty(e, f * len(self.names), dtype=dtype)) if biased else None
        self.down_bias = nn.Parameter(torch.empty(e, inputs, dtype=dtype)) if biased else None
        self.latent_in = Linear(d, latent, bias=biased, dtype=dtype) if latent else None
        self.latent_out = Linear(latent, d, bias=biased, dtype=dtype) if latent else None
        width = config.shared_expert_intermediate_size
        self.shared = MLP(config, width, dtype) if width else None
        self.shared_gate = nn.Parameter(torch.empty(1, d, dtype=dtype)) if config.shared_expert_gate else None
        self.packed: ExpertWeights | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (b·s, d)
        entered = rows if self.latent_in is None else self.latent_in(rows)
        mixed = apply_experts(entered, self.route(rows), self.packed or self._weights(self.up, self.down))
        mixed = (mixed if self.latent_out is None else self.latent_out(mixed)).view_as(x)
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        return mixed + (shared if self.shared_gate is None else linear(x, self.shared_gate).sigmoid() * shared)

    def _weights(self, up: Tensor, down: Tensor) -> ExpertWeights:
        by, weigh_inputs = plain_activation(self.config), self.config.weigh_expert_inputs
        return ExpertWeights(up, down, (), (), self.up_bias, self.down_bias, by, weigh_inputs)

    def route(self, rows: Tensor) -> Routing:
        """The experts that rows (r, d) go to."""
        c = self.config
        return route(
            rows,
            self.gate,
            self.correction_bias,
            num_active=c.num_experts_per_tok,
            num_groups=c.expert_num_groups,
            topk_groups=c.expert_topk_groups,
            normalise=c.norm_topk_prob,
            scaling_factor=c.routed_scaling_factor,
            router=c.router,
            bias=self.gate_bias,
        )

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        for part in (self.shared, self.latent_in, self.latent_out):
            if part is not None:
                part.pack_(dtype, pack)
        for parameter in (self.gate, self.gate_bias, self.correction_bias):
            if parameter is not None:  # else the router would convert them at every call
                parameter.data = parameter.data.double()
        for small in (self.up_bias, self.down_bias, self.shared_gate):
            if small is not None:
                small.data = small.data.to(dtype)
        if not hasattr(self, "up"):
            return  # a guest has taken the experts
        if dtype == torch.bfloat16:
            return  # bf16 matrix units multiply the stacked experts at once, see `ops.moe`
        ups, downs = [pack(w) for w in self.up], [pack(w.t().contiguous()) for w in self.down]
        if all(w is not None for w in (*ups, *downs)):
            none = self.up.new_empty(0)
            self.packed = self._weights(none, none)._replace(
                packed_up=tuple(w for w in ups if w is not None), packed_down=tuple(w for w in downs if w is not None)
            )
            del self.up, self.down

    def released_tensors(self) -> dict[str, Tensor]:
        if not hasattr(self, "up"):
            raise ValueError("this model is packed for inference and can't be saved; load it with pack=False")
        found = {"gate.weight": self.gate.data, "gate.e_score_correction_bias": self.correction_bias.data}
        if self.gate_bias is not None:
            found["gate.bias"] = self.gate_bias.data
        if self.shared_gate is not None:
            found["shared_expert_gate.weight"] = self.shared_gate.data
        for name, latent in (("fc1_latent_proj", self.latent_in), ("fc2_latent_proj", self.latent_out)):
            if latent is not None:
                found |= latent.released_tensors((name,), (latent.outputs,))
        for j in range(self.config.num_experts):
            found |= {f"experts.{j}.{name}": tensor for name, tensor in self._expert(j).items()}
        shared = {} if self.shared is None else self.shared.released_tensors()
        return found | {f"shared_experts.{k}": v for k, v in shared.items()}

    def _expert(self, j: int) -> dict[str, Tensor]:
        """The released tensors of one expert."""
        ups = zip(self.names, self.up.data[j].chunk(len(self.names)), strict=True)
        found = {f"{name}.weight": weight for name, weight in ups}
        found["down_proj.weight"] = self.down.data[j].t()
        if self.up_bias is not None and self.down_bias is not None:
            biases = zip(self.names, self.up_bias.data[j].chunk(len(self.names)), strict=True)
            found |= {f"{name}.bias": bias for name, bias in biases} | {"down_proj.bias": self.down_bias.data[j]}
        return found
