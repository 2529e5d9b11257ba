"""Which settings of tokens a model can follow."""

import torch

from twotower.decoding.bad_words import word_sequences
from twotower.decoding.constraint import first_tokens
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def check_shape(model: TwoTower, params: SamplingParams) -> None:
    """Raises SettingError for settled params that name tokens which the model doesn't have or never writes, or that
    could leave a place without any possible token."""
    mask, size = model.config.mask_token_id, model.config.vocab_size
    biases, allowed = dict(params.logit_bias), params.allowed_token_ids
    named = {"logit_bias": biases, "allowed_token_ids": allowed or (), "stop_token_ids": params.stop_token_ids}
    for name, ids in named.items():
        for i in ids:
            if i >= size:
                rule = f"about token ids in [0, {size - 1}], and has {i}"
                raise SettingError(name, getattr(params, name), rule, "was another tokenizer used?")
    for name, ids in {"logit_bias": biases, "allowed_token_ids": allowed or ()}.items():
        if mask in ids:
            rule = f"without {mask}, the mask token, which no text has: its logit is −∞ whatever a setting says"
            raise SettingError(name, getattr(params, name), rule, "leave it out")
    most = params.max_new_tokens
    assert most is not None
    if params.min_tokens > most:
        raise SettingError("min_tokens", params.min_tokens, f"at most max_new_tokens, {most}", "lower it or raise that")
    if allowed or params.bad_words or params.min_tokens:
        _check_possible(model, params)


def _check_possible(model: TwoTower, params: SamplingParams) -> None:
    """Raises SettingError where a place could have no possible token."""
    mask, size, allowed = model.config.mask_token_id, model.config.vocab_size, params.allowed_token_ids
    words = word_sequences(model, params.bad_words)
    any_order = params.allow_loss or (params.mode in MODES and MODES[params.mode].fills_blocks)
    # from left to right a word's last token is kept away, in a block any of them
    never = {mask, *(i for word in words for i in (word if any_order else word[-1:]))}
    early = never | {*model.config.eos_token_ids, *params.stop_token_ids} if params.min_tokens else never
    if not (size - len(early) if allowed is None else set(allowed) - early):
        others = " and ".join(name for name in ("bad_words", "min_tokens") if getattr(params, name))
        if allowed is not None:
            rule = f"with a token that {others} never forbid{'s' if ' ' not in others else ''}"
            raise SettingError("allowed_token_ids", allowed, rule, "allow others, or forbid less")
        name = "bad_words" if params.bad_words else "min_tokens"
        rule = f"such that a token is left that {'ends none of them' if words else 'ends no text'}"
        raise SettingError(name, getattr(params, name), rule, "forbid less")
    if params.constraint is not None:
        first = first_tokens(model, params)
        assert first is not None
        if allowed is not None:
            first &= torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(allowed), True)
        first[[mask, *(word[0] for word in words if len(word) == 1)]] = False
        if not first.any():
            kind, text = params.constraint
            name = "bad_words" if allowed is None else "allowed_token_ids"
            rule = f"such that a text that follows {kind} {text!r:.100} can begin, and its first token is forbidden"
            raise SettingError(name, getattr(params, name), rule, "change one of the two")
