"""The context tower as models of vLLM."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.nemotron_h import (
    ALL_DECODER_LAYER_TYPES,
    NemotronHForCausalLM,
    NemotronHModel,
    NemotronHMoEDecoderLayer,
)
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.platforms import current_platform

from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import resolve
from twotower.integrations.vllm.denoiser import Denoiser
from twotower.integrations.vllm.experts import CpuExpertsLayer
from twotower.integrations.vllm.layers import GatedMLPLayer, RotaryAttentionLayer
from twotower.integrations.vllm.patches import write_blocks
from twotower.integrations.vllm.quantisation import ContextLayers, rename_layers_
from twotower.integrations.vllm.server import server_settings

_NAMES = WeightsMapper(
    orig_to_new_substr={"A_log": "A", "embeddings": "embed_tokens"},
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
    },
    # In this order: the denoiser's head goes before the context tower's gets its name. The denoiser reads its own.
    orig_to_new_prefix={
        "denoiser_tower.": None,
        "lm_head.": None,
        "t_embedder.": None,
        "t_block.": None,
        "scale_shift_tables.": None,
        "context_tower.": "model.",
        "context_lm_head.": "lm_head.",
    },
)
_GATED_NAMES = _NAMES | WeightsMapper(
    orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
)


class TwoTowerHybridForCausalLM(NemotronHForCausalLM):
    """The context tower of a two-tower checkpoint, of layers `M`, `*`, `-` and `E`.

    Nemotron-H's model with other layers and names of tensors: its forward pass, states, parallelism and quantisation

    are vLLM's. `denoiser` is None unless the server asked for it.
    """

    hf_to_vllm_mapper = _NAMES
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        # What can't be is refused before weights are read.
        settings = server_settings(vllm_config)
        self.denoiser = Denoiser(vllm_config, settings) if settings.denoiser else None
        if self.denoiser is not None and not vllm_config.use_v2_model_runner:
            write_blocks()
        config = vllm_config.model_config.hf_config
        if self.quant_config is not None:
            layers = ContextLayers(read_config(resolve(vllm_config.model_config.model)), self.packed_modules_mapping)
            rename_layers_(self.quant_config, layers)
            self.quant_config.packed_modules_mapping.update(self.packed_modules_mapping)
        self.config = config
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        if config.gated_mlp:
            self.hf_to_vllm_mapper = _GATED_NAMES
        self.model = NemotronHModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_types=_layer_types(config)
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            # A head that is the embedding is none of the layers that may be quantised, whatever its name.
            quant_config=None if config.tie_word_embeddings else self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self._count_experts()

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits (t, v) by which the mask token, which no mode may write, is impossible; None on a rank without."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits[:, self.config.mask_token_id] = -torch.inf
        return logits

    def get_model_state_cls(self) -> type:
        """What vLLM's second runner keeps for this model, of which the first never asks."""
        from twotower.integrations.vllm.model_states import state_class

        return state_class(hybrid=self.is_hybrid, blocks=self.denoiser is not None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads the context tower from a checkpoint's tensors, and the denoiser where the server asked for it."""
        if self.denoiser is not None:
            self.denoiser.load()
        return super().load_weights(weights)

    def _maybe_apply_model_mapping(self) -> None:
        """Nothing in the place of vLLM's renaming of quantised layers, which knows no patterns and takes the denoiser's
        head for the context tower's: `rename_layers_` does it."""

    def _count_experts(self) -> None:
        """Sets what vLLM's expert parallelism reads, see its protocol MixtureOfExperts."""
        mixers = [layer.mixer for layer in self.model.layers if isinstance(layer, NemotronHMoEDecoderLayer)]
        if not mixers:
            return
        last = mixers[-1]
        self.moe_layers = [mixer.experts for mixer in mixers]
        self.num_moe_layers = len(mixers)
        self.num_expert_groups = self.config.n_group
        self.num_logical_experts = last.n_logical_experts
        self.num_physical_experts = last.n_physical_experts
        self.num_local_physical_experts = last.n_local_physical_experts
        self.num_routed_experts = last.n_routed_experts
        self.num_shared_experts = last.n_shared_experts
        self.num_redundant_experts = last.n_redundant_experts


class TwoTowerTransformerForCausalLM(TwoTowerHybridForCausalLM):
    """The same without recurrent layers, such as a Llama-family context tower: vLLM keeps no states for it."""

    has_inner_state = False
    is_hybrid = False
    supports_mamba_prefix_caching = False
    supports_replayssm = False


def _layer_types(config: object) -> dict[str, type[nn.Module]]:
    types = dict(ALL_DECODER_LAYER_TYPES)
    if getattr(config, "use_rope", False):
        types["*"] = RotaryAttentionLayer
    if getattr(config, "gated_mlp", False):
        types["-"] = GatedMLPLayer
    if current_platform.is_cpu():
        types["E"] = CpuExpertsLayer
    return types
