"""Both towers against a second reading of the architecture: float64, one token at a time, no cache, no fused weights.

Letters: t tokens, d width, h heads, p head width, n state width.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.two_tower import TwoTower
from twotower.rope import AttentionType, Rope

# Of latent attention; its norms have an epsilon of their own
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "attention_types": (AttentionType(rope_parameters=Rope(partial_rotary_factor=0.5)),),
    "layer_norm_epsilon": 1e-6,
}
# (pattern, config): every switch that changes the computation
CASES: list[tuple[str, dict[str, Any]]] = [
    ("M*-E", {}),
    ("E-*M", {"mlp_bias": True, "attention_bias": True, "use_bias": True}),
    ("MM", {"time_step_limit": (0.05, 0.15), "use_conv_bias": False, "conv_kernel": 2}),
    ("MM", {"time_step_limit": (0.1, float("inf")), "mamba_num_groups": 4}),
    ("EE", {"expert_num_groups": 4, "expert_topk_groups": 2, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    ("M*E", {"residual_in_fp32": True, "layer_norm_epsilon": 1e-2}),
    ("**", {"num_key_value_heads": 4}),
    ("**", {"num_key_value_heads": 1, "use_rope": True, "rope_theta": 100.0}),
    ("llama", {}),
    ("MEM*-*", {"denoiser_layers": (1, 2, 5)}),
    ("*-*-*-", {"denoiser_layers": (2, 3), "use_rope": True, "attention_scale_by_depth": True}),
    ("llama", {"tie_word_embeddings": False, "mlp_bias": True}),
    ("**", LATENTS),
    ("*", LATENTS | {"q_lora_rank": 0, "v_head_dim": 8, "attention_bias": True}),
    ("**", {"use_rope": True, "qk_norm": "head", "qk_norm_behind_rope": True, "clip_qkv": 0.8}),
    (
        "**",
        {
            "attention_types": (AttentionType(query_growth=0.7, query_period=3, query_offset=1), AttentionType()),
            "attention_pattern": "01",
            "attention_scale_by_depth": True,
            "head_bias": True,
        },
    ),
    ("**", {"alibi_slopes": (0.5, 0.25, 0.1, 0.0), "embedding_norm": True}),
    ("*-", {"head_bias": True, "tie_word_embeddings": True, "num_attention_heads": 2}),
    ("-", {"mlp_hidden_act": "xielu"}),
    ("E-", {"gated_mlp": True, "mlp_hidden_act": "silu", "router": "softmax", "shared_expert_gate": True}),
    ("E", {"moe_latent_size": 20, "router_bias": True, "mlp_bias": True}),
    ("E", {"gated_mlp": True, "mlp_hidden_act": "silu", "weigh_expert_inputs": True, "num_experts_per_tok": 1}),
    ("E", {"shared_expert_intermediate_size": 0, "router": "softmax", "norm_topk_prob": False}),
]


class Reference:
    def __init__(self, model: TwoTower) -> None:
        self.c = model.config
        self.w = {name: tensor.double() for name, tensor in model.released_tensors().items()}

    def head(self, tower: str, head: str, hidden: Tensor) -> Tensor:
        weight = self.w[f"{tower}.embeddings.weight" if self.c.tie_word_embeddings else f"{head}.weight"]
        logits = hidden @ weight.t() + self.w.get(f"{head}.bias", torch.zeros(()))
        logits[:, self.c.mask_token_id] = -torch.inf
        return logits

    def norm(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))
        mean = (parts**2).mean(-1, keepdim=True)
        return (parts / (mean + self.c.layer_norm_epsilon).sqrt()).flatten(-2) * weight

    def project(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].t()
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def mamba(self, name: str, x: Tensor, seed: tuple | None) -> tuple[Tensor, tuple]:
        c, w = self.c, self.w
        h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.mamba_num_groups, c.mamba_state_size
        window, H = seed or ([torch.zeros(c.conv_width, dtype=torch.float64)] * (c.conv_kernel - 1), None)
        H = torch.zeros(h, p, n, dtype=torch.float64) if H is None else H
        out = []
        for row in self.project(f"{name}.in_proj", x):
            z, xbc, dt = row.split((h * p, c.conv_width, h))
            window = [*window, xbc][-c.conv_kernel :]
            conv = sum(tap * r for tap, r in zip(w[f"{name}.conv1d.weight"][:, 0].t(), window, strict=True))
            window = window[1:]
            active = F.silu(conv + w.get(f"{name}.conv1d.bias", torch.zeros(())))
            xs, B, C = active.split((h * p, g * n, g * n))
            xs, B, C = xs.view(h, p), B.view(g, n), C.view(g, n)
            dt = F.softplus(dt + w[f"{name}.dt_bias"]).clamp(*c.time_step_limit)
            A = -w[f"{name}.A_log"].exp()
            H = torch.stack(
                [(dt[i] * A[i]).exp() * H[i] + dt[i] * torch.outer(xs[i], B[i // (h // g)]) for i in range(h)]
            )
            y = torch.stack([H[i] @ C[i // (h // g)] + w[f"{name}.D"][i] * xs[i] for i in range(h)])
            out.append(self.norm(y.flatten() * F.silu(z), w[f"{name}.norm.weight"], g))
        return self.project(f"{name}.out_proj", torch.stack(out)), (window, H)

    def rope(self, x: Tensor, start: int) -> Tensor:
        out = x.clone()  # (t, h, p)
        half = x.shape[-1] // 2
        for i in range(x.shape[0]):
            for j in range(half):
                angle = (start + i) * self.c.rope_theta ** (-2 * j / x.shape[-1])
                a, b = x[i, :, j], x[i, :, j + half]
                out[i, :, j] = a * math.cos(angle) - b * math.sin(angle)
                out[i, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(self, name: str, x: Tensor, seed: tuple | None, causal: bool) -> tuple[Tensor, tuple]:
        c = self.c
        if c.kv_lora_rank:
            q, k, v = self.latent_heads(name, x)
        else:
            q, k, v = (self.project(f"{name}.{part}_proj", x).unflatten(-1, (-1, c.head_dim)) for part in "qkv")
        number = c.pattern[: int(name.split(".")[2])].count("*")
        start, kind = seed[0].shape[0] if seed else 0, c.attention_kinds[c.attention_indices[number]]
        if c.clip_qkv:
            q, k, v = (part.clamp(-c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        if c.use_rope:
            q, k = self.rope(q, start), self.rope(k, start)
        elif c.kv_lora_rank:
            turned = c.qk_rope_head_dim
            q, k = (torch.cat((self.rope(h[..., :turned], start), h[..., turned:]), -1) for h in (q, k))
        if c.qk_norm:  # of each head, behind RoPE
            q, k = (self.norm(part, self.w[f"{name}.{which}_norm.weight"]) for part, which in ((q, "q"), (k, "k")))
        if kind.query_growth:
            steps = [(start + i + kind.query_offset) // kind.query_period for i in range(q.shape[0])]
            q = torch.stack([row * (1 + kind.query_growth * math.log(1 + n)) for row, n in zip(q, steps, strict=True)])
        scale = c.head_dim**-0.5 / (number + 1 if c.attention_scale_by_depth else 1)
        if seed:
            k, v = torch.cat((seed[0], k)), torch.cat((seed[1], v))
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        for i in range(q.shape[0]):
            end = start + i + 1 if causal else k.shape[0]
            for head in range(q.shape[1]):
                kv = head // (c.num_attention_heads // c.num_key_value_heads)
                away = (torch.arange(end) - (start + i)).abs() * (c.alibi_slopes[head] if c.alibi_slopes else 0.0)
                weights = (k[:end, kv] @ q[i, head] * scale - away).softmax(0)
                out[i, head] = weights @ v[:end, kv]
        return self.project(f"{name}.o_proj", out.flatten(1)), (k, v)

    def latent_heads(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, w = self.c, self.w
        sizes = (c.kv_lora_rank, c.qk_rope_head_dim)
        q = self.norm(self.project(f"{name}.q_a_proj", x), w[f"{name}.q_a_norm.weight"]) if c.q_lora_rank else x
        q = self.project(f"{name}.q_proj", q).unflatten(-1, (c.num_attention_heads, -1))
        latent, shared = self.project(f"{name}.kv_a_proj", x).split(sizes, -1)
        both = self.project(f"{name}.kv_b_proj", self.norm(latent, w[f"{name}.kv_a_norm.weight"]))
        own, v = both.unflatten(-1, (c.num_attention_heads, -1)).split((c.qk_nope_head_dim, c.v_head_dim), -1)
        return q, torch.cat((shared[:, None].expand(-1, c.num_attention_heads, -1), own), -1), v

    def mlp(self, name: str, x: Tensor) -> Tensor:
        up = self.project(f"{name}.up_proj", x)
        if self.c.gated_mlp:
            hidden = F.silu(self.project(f"{name}.gate_proj", x)) * up
        elif self.c.mlp_hidden_act == "xielu":
            above, below = (F.softplus(self.w[f"{name}.alpha_{side}"]) for side in "pn")
            hidden = torch.where(up > 0, above * up * up, (up.exp() - 1 - up) * (0.5 + below)) + 0.5 * up
        else:
            hidden = up.relu() ** 2
        return self.project(f"{name}.down_proj", hidden)

    def experts(self, name: str, x: Tensor) -> Tensor:
        c, w, out = self.c, self.w, []
        size = c.num_experts // c.expert_num_groups
        for row in x:
            logits = w[f"{name}.gate.weight"] @ row + w.get(f"{name}.gate.bias", 0.0)
            scores = logits.sigmoid() if c.router == "sigmoid" else logits.softmax(0)
            choice = scores + w[f"{name}.gate.e_score_correction_bias"]
            if c.expert_num_groups > 1:
                best = choice.view(-1, size).topk(2).values.sum(-1).topk(c.expert_topk_groups).indices.tolist()
                choice = torch.stack([v if e // size in best else v - math.inf for e, v in enumerate(choice)])
            chosen = choice.topk(c.num_experts_per_tok).indices.tolist()
            total = scores[chosen].sum() if c.norm_topk_prob else 1.0
            inputs = self.project(f"{name}.fc1_latent_proj", row) if c.moe_latent_size else row
            y = torch.zeros_like(inputs)
            for e in chosen:
                weight = scores[e] / total * c.routed_scaling_factor
                expert = f"{name}.experts.{e}"
                y = y + (
                    self.mlp(expert, weight * inputs) if c.weigh_expert_inputs else weight * self.mlp(expert, inputs)
                )
            y = self.project(f"{name}.fc2_latent_proj", y) if c.moe_latent_size else y
            if c.shared_expert_intermediate_size:
                gate = self.project(f"{name}.shared_expert_gate", row).sigmoid() if c.shared_expert_gate else 1.0
                y = y + gate * self.mlp(f"{name}.shared_experts", row)
            out.append(y)
        return torch.stack(out)

    def modulations(self, t: float) -> list[Tensor]:
        w = self.w
        angles = torch.tensor([1000 * t * 10000 ** (-j / 128) for j in range(128)], dtype=torch.float64)
        x = torch.cat((angles.cos(), angles.sin()))
        hidden = self.project("t_embedder.mlp.2", F.silu(self.project("t_embedder.mlp.0", x)))
        shared = self.project("t_block.1", F.silu(hidden)).view(3, -1)
        return [shared + w.get(f"scale_shift_tables.{i}", 0) for i in range(self.c.num_layers)]

    def tower(self, tower: str, ids: list[int], seeds: list | None, t: float | None) -> tuple[Tensor, list]:
        """Hidden (t, d) and each layer's state; a block seeded by the context's states where `seeds` is given."""
        x, states = self.w[f"{tower}.embeddings.weight"][ids], []
        x = self.norm(x, self.w[f"{tower}.embedding_norm.weight"]) if self.c.embedding_norm else x
        modulations = [None] * self.c.num_layers if t is None else self.modulations(t)
        for i, kind in enumerate(self.c.pattern):
            if tower == "denoiser_tower" and i not in self.c.denoiser_indices:
                continue
            name, m = f"{tower}.layers.{i}", modulations[i]
            weight = self.w[f"{name}.norm.weight"]
            shift, scale, gate = (0, 0, 1) if m is None else m
            entered = (
                self.norm(x * (1 + scale) + shift, weight)
                if kind in "M*"
                else self.norm(x, weight) * (1 + scale) + shift
            )
            state = None
            if kind == "M":
                mixed, state = self.mamba(f"{name}.mixer", entered, seeds and seeds[i])
            elif kind == "*":
                mixed, state = self.attention(f"{name}.mixer", entered, seeds and seeds[i], causal=seeds is None)
            else:
                mixed = (self.mlp if kind == "-" else self.experts)(f"{name}.mixer", entered)
            x = x + gate * mixed
            states.append(state)
        return self.norm(x, self.w[f"{tower}.norm_f.weight"]), states


@pytest.mark.parametrize(("pattern", "config"), CASES)
def test_context_logits(pattern: str, config: dict[str, Any], tiny: Callable, ids: Callable, close: Callable) -> None:
    model = tiny(pattern, dtype=torch.float64, **config)
    reference, tokens = Reference(model), ids(1, 12)
    hidden, _ = reference.tower("context_tower", tokens[0].tolist(), None, None)
    # float32 where the model is: logits, RoPE's angles
    close(model.context_logits(tokens)[0], reference.head("context_tower", "context_lm_head", hidden), 1e-5)


@pytest.mark.parametrize(("pattern", "config"), CASES)
@pytest.mark.parametrize("t", [0.25, 1.0])
def test_denoise(
    pattern: str, config: dict[str, Any], t: float, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model = tiny(pattern, dtype=torch.float64, **config)
    reference, tokens, block = Reference(model), ids(1, 9), [3, 7, 3, 9, 3]
    _, seeds = reference.tower("context_tower", tokens[0].tolist(), None, None)
    hidden, _ = reference.tower("denoiser_tower", block, seeds, t)
    logits = model.denoise([block], model.prefill(tokens), t)
    # float32 where the model is: logits, RoPE's and the time embedding's angles (up to 1000 radians: 3e-5)
    close(logits[0], reference.head("denoiser_tower", "lm_head", hidden), 1e-4)


@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        ("M", {"time_step_limit": (0.05, float("inf"))}),
        ("M", {"time_step_limit": (0.0, 0.15)}),
        ("M*", {"layer_norm_epsilon": 1e-2}),
        ("*", {"use_rope": True}),
        ("llama", {"rope_theta": 100.0}),
        ("E", {"expert_num_groups": 4}),
        ("E", {"expert_num_groups": 4, "expert_topk_groups": 2}),
        ("E", {"num_experts_per_tok": 3}),
        ("E", {"norm_topk_prob": False}),
        ("E", {"routed_scaling_factor": 1.0}),
        ("E", {"router": "softmax"}),
        ("E", {"weigh_expert_inputs": True}),
        ("-", {"mlp_hidden_act": "relu"}),
        ("llama", {"mlp_hidden_act": "gelu_tanh"}),
        ("llama", {"glu_limit": 0.2}),
        ("llama", {"glu_offset": 1.0}),
    ],
)
def test_each_switch_matters(pattern: str, changed: dict[str, Any], tiny: Callable, ids: Callable) -> None:
    """The same weights under another config: else the cases above would prove less than they seem to."""
    default, other = tiny(pattern, dtype=torch.float64), tiny(pattern, dtype=torch.float64, **changed)
    pairs = zip(default.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    difference = default.context_logits(ids(1, 12)) - other.context_logits(ids(1, 12))
    assert difference.nan_to_num().abs().max() > 1e-3  # nan for the mask, which both rule out
