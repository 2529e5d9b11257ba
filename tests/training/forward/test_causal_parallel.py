from collections.abc import Callable
from typing import Any

import pytest
import torch

from twotower.rope import AttentionType
from twotower.training.forward.causal_parallel import causal_hidden
from twotower.training.forward.layout import make_layout

# Windows, learnt positions, parallel layers and norms around them
OTHER = {"attention_types": (AttentionType(window=9),), "num_positions": 90, "parallel": "*-", "post_norm": True}


@pytest.mark.parametrize(("pattern", "config"), [("M*-E", {}), ("llama", {}), ("*-*-", OTHER)])
@pytest.mark.parametrize("recompute", [False, True])
def test_each_document_is_what_decoding_computes(
    pattern: str, config: dict[str, Any], recompute: bool, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64, **config), ids(2, 83)
    document = torch.zeros(2, 83, dtype=torch.int64)
    document[0, 30:] = 1
    layout = make_layout(document, 16)
    hidden, loads = causal_hidden(model.context_tower, x0, layout, chunk_size=32, recompute=recompute)
    assert loads.shape == (pattern.count("E"), model.config.num_experts)
    assert loads.sum() == pattern.count("E") * x0.numel() * model.config.num_experts_per_tok
    for row, start, end in ((0, 0, 30), (0, 30, 83), (1, 0, 83)):
        alone = model.score(x0[row : row + 1, start:end], model.prefill(x0[row : row + 1, :0]))
        close(hidden[row, start:end], alone.hidden[0], 1e-10)
    hidden.square().sum().backward()
    grads = [p.grad for n, p in model.context_tower.named_parameters() if not n.endswith("correction_bias")]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
