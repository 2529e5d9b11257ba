"""Layers of the Llama family in the place of Nemotron-H's, made of vLLM's own parts."""

from torch import Tensor
from transformers import NemotronHConfig
from vllm.config import CacheConfig, ModelConfig, ParallelConfig
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.nemotron_h import NemotronHAttentionDecoderLayer, NemotronHMLPDecoderLayer


class RotaryAttentionLayer(NemotronHAttentionDecoderLayer):
    """Nemotron-H's attention layer with RoPE on queries and keys."""

    def __init__(self, config: NemotronHConfig, layer_idx: int, **parts: object) -> None:
        super().__init__(config, layer_idx, **parts)
        self.rotary_emb = get_rope(
            self.mixer.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            hidden_states, residual = self.norm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        mixer = self.mixer
        qkv, _ = mixer.qkv_proj(hidden_states)
        q, k, v = qkv.split([mixer.q_size, mixer.kv_size, mixer.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = mixer.o_proj(mixer.attn(q, k, v))
        return output, residual


class GatedMLPLayer(NemotronHMLPDecoderLayer):
    """Nemotron-H's MLP layer with Llama's MLP."""

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
        super().__init__(config, layer_idx, prefix=prefix)
        self.mixer = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.mlp_hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mixer",
        )
