"""Experts with relu² on CPUs, for which vLLM's CPU build has no kernel. Letters: t tokens, d width, e experts, a active
experts per token, f width of an expert on this rank."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from vllm.config import CacheConfig, ModelConfig, ParallelConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.nemotron_h import NemotronHMLP

from twotower.ops.moe import ExpertWeights, apply_experts, route


# One opaque call for torch.compile: which rows an expert gets depends on their values.
@torch.library.custom_op("twotower::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor,
    gate: Tensor,
    correction_bias: Tensor,
    up: Tensor,
    down: Tensor,
    num_active: int,
    num_groups: int,
    topk_groups: int,
    normalise: bool,
    scaling_factor: float,
) -> Tensor:
    """`ops.moe.route` and `apply_experts` for x (t, d): (t, d), with gate (e, d), up and down (e, f, d)."""
    routing = route(
        x,
        gate,
        correction_bias,
        num_active=num_active,
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalise=normalise,
        scaling_factor=scaling_factor,
    )
    return apply_experts(x, routing, ExpertWeights(up, down))


@routed_experts.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


class _Stacked(nn.Module):
    """Up and down projections of all experts, of each the part of this rank."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        parts = get_tensor_model_parallel_world_size()
        width = config.moe_intermediate_size
        if width % parts:
            raise ValueError(
                f"moe_intermediate_size is {width}, must be a multiple of --tensor-parallel-size {parts}; "
                "choose another size"
            )
        self.width = width // parts
        shape = (config.n_routed_experts, self.width, config.hidden_size)
        self.up = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.down = nn.Parameter(torch.empty(shape), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes `j.up_proj.weight` (f of all ranks, d) and `j.down_proj.weight` (d, f of all ranks). Raises ValueError
        for quantised ones."""
        first = get_tensor_model_parallel_rank() * self.width
        stacks = {"up_proj": self.up, "down_proj": self.down}
        for name, weight in weights:
            expert, projection, part = name.split(".")
            if part != "weight" or not weight.is_floating_point() or weight.itemsize < 2:
                raise ValueError(
                    f"the experts are quantised ({name} in {weight.dtype}), must be floats on a CPU; serve the "
                    "checkpoint on GPUs, or with twotower serve"
                )
            rows = weight if projection == "up_proj" else weight.t()
            stacks[projection].data[int(expert)].copy_(rows[first : first + self.width])
        return {"up", "down"}


class CpuMixtureOfExperts(nn.Module):
    """What `NemotronHMoE` computes, with PyTorch's products and the router in float64, as `model.moe` has it."""

    def __init__(self, config: NemotronHConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False, dtype=torch.float32)
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.experts = _Stacked(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = NemotronHMLP(
                config,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_shared_expert_intermediate_size,
                quant_config=quant_config,
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        y = routed_experts(
            x,
            self.gate.weight,
            self.gate.e_score_correction_bias,
            self.experts.up,
            self.experts.down,
            c.num_experts_per_tok,
            c.n_group,
            c.topk_group,
            c.norm_topk_prob,
            float(c.routed_scaling_factor),
        )
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return tensor_model_parallel_all_reduce(y) if get_tensor_model_parallel_world_size() > 1 else y


class CpuExpertsLayer(nn.Module):
    """`NemotronHMoEDecoderLayer` with the experts above."""

    def __init__(
        self,
        config: NemotronHConfig,
        layer_idx: int,
        model_config: ModelConfig | None = None,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        parallel_config: ParallelConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.mixer = CpuMixtureOfExperts(config, quant_config, f"{prefix}.mixer")
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, hidden_states: Tensor, residual: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self.mixer(self.norm(hidden_states)), hidden_states
        hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states), residual
