from collections.abc import Callable

import torch

from twotower.model.head import Head


def test_logits_are_scaled_then_capped_and_the_mask_stays_out(tiny: Callable) -> None:
    config = tiny("-", logit_scale=3.0, logit_softcap=2.0).config
    head = Head(config, torch.float64)
    torch.manual_seed(0)
    head.weight.data = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.float64)
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    expected = 2.0 * (x @ head.weight.T * 3.0 / 2.0).tanh()
    expected[..., config.mask_token_id] = -torch.inf
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_through_scale_and_cap_are_the_loss_without_the_mask(tiny: Callable) -> None:
    config = tiny("-", logit_scale=3.0, logit_softcap=2.0).config
    head = Head(config, torch.float64)
    torch.manual_seed(0)
    head.weight.data = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.float64)
    x = torch.randn(4, config.hidden_size, dtype=torch.float64)
    kept = [i for i in range(config.vocab_size) if i != config.mask_token_id]
    head(x).log_softmax(-1)[:, 5].sum().backward()
    found, head.weight.grad = head.weight.grad, None
    logits = 2.0 * (x @ head.weight.T * 3.0 / 2.0).tanh()
    logits[:, kept].log_softmax(-1)[:, kept.index(5)].sum().backward()
    torch.testing.assert_close(found, head.weight.grad, rtol=1e-10, atol=1e-12)
