"""The `E` mixer: a mixture of experts. Letters: b batch, s tokens, d width, e experts, f expert width."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Pack
from twotower.model.mlp import MLP
from twotower.ops.moe import ExpertWeights, Routing, apply_experts, route


class MixtureOfExperts(nn.Module):
    """Routed experts, stacked, beside one shared expert that always runs."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        e, f, d = config.num_experts, config.expert_intermediate_size, config.hidden_size
        # float32 in every model: the router computes in float64 and its choices must not depend on the dtype
        self.gate = nn.Parameter(torch.empty(e, d, dtype=torch.promote_types(dtype, torch.float32)))
        self.correction_bias = nn.Parameter(torch.empty(e, dtype=self.gate.dtype))
        # Both with d last: an expert's slice and the product over all experts then need no copy.
        self.up = nn.Parameter(torch.empty(e, f, d, dtype=dtype))
        self.down = nn.Parameter(torch.empty(e, f, d, dtype=dtype))
        self.up_bias = nn.Parameter(torch.empty(e, f, dtype=dtype)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.empty(e, d, dtype=dtype)) if config.mlp_bias else None
        self.shared = MLP(d, config.shared_expert_intermediate_size, gated=False, bias=config.mlp_bias, dtype=dtype)
        self.packed: ExpertWeights | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (b·s, d)
        weights = self.packed or ExpertWeights(self.up, self.down, (), (), self.up_bias, self.down_bias)
        return apply_experts(rows, self.route(rows), weights).view_as(x) + self.shared(x)

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
        )

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.shared.pack_(dtype, pack)
        for parameter in (self.gate, self.correction_bias):  # else the router would convert them at every call
            parameter.data = parameter.data.double()
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                bias.data = bias.data.to(dtype)
        if not hasattr(self, "up"):
            return  # a guest has taken the experts
        if dtype == torch.bfloat16:
            return  # bf16 matrix units multiply the stacked experts at once, see `ops.moe`
        ups, downs = [pack(w) for w in self.up], [pack(w.t().contiguous()) for w in self.down]
        if all(w is not None for w in (*ups, *downs)):
            none = self.up.new_empty(0)
            self.packed = ExpertWeights(
                none,
                none,
                tuple(w for w in ups if w is not None),
                tuple(w for w in downs if w is not None),
                self.up_bias,
                self.down_bias,
            )
            del self.up, self.down

    def released_tensors(self) -> dict[str, Tensor]:
        if not hasattr(self, "up"):
            raise ValueError("this model is packed for inference and can't be saved; load it with pack=False")
        found = {"gate.weight": self.gate.data, "gate.e_score_correction_bias": self.correction_bias.data}
        for j in range(self.config.num_experts):
            found[f"experts.{j}.up_proj.weight"] = self.up.data[j]
            found[f"experts.{j}.down_proj.weight"] = self.down.data[j].t()
            if self.up_bias is not None and self.down_bias is not None:
                found[f"experts.{j}.up_proj.bias"] = self.up_bias.data[j]
                found[f"experts.{j}.down_proj.bias"] = self.down_bias.data[j]
        return found | {f"shared_experts.{k}": v for k, v in self.shared.released_tensors().items()}
