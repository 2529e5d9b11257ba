"""The one check of prompts: every entrance of the library makes token ids of them here."""

import functools
import json
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
import torch

from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

Prompt = str | Sequence[int]
# A name that stands in no text: a noncharacter of Unicode
_NO_TEXT = "\U0010ffff"


def check_prompts(prompts: Sequence[Prompt], name: str = "prompts") -> None:
    """Raises SettingError, which calls them `name`, for one bare prompt or text where a list of them is meant."""
    if isinstance(prompts, str):
        raise SettingError(name, prompts, f"a list of {name}, and is one string", "write it in [ ]")
    first = next(iter(prompts), None)
    if first is not None and not isinstance(first, Iterable):
        raise SettingError(name, prompts, f"a list of {name}, and is the ids of one", "write it in [ ]")


def prompt_ids(model: TwoTower, prompt: Prompt, name: str = "prompt") -> tuple[int, ...]:
    """The token ids of a prompt, at least one: an empty prompt is the BOS token.

    Raises SettingError, which calls the prompt `name`, for text without a tokenizer, for an empty prompt without a BOS
    token, and for ids that are no integers or not in the vocabulary.
    """
    config = model.config
    ids = text_ids(model, prompt, name, special=True)
    if not ids:
        if config.bos_token_id is None:
            rule = "not empty, because the config has no bos_token_id"
            raise SettingError(name, prompt, rule, "give at least one token")
        ids = (config.bos_token_id,)
    return ids


def text_ids(model: TwoTower, text: Prompt, name: str, *, special: bool = False) -> tuple[int, ...]:
    """The token ids of a text, maybe none; with `special` those that the tokenizer adds, such as BOS, are among them.

    The mask token's name in a string is text, as it is to the backbone; only ids can name the mask. Raises
    SettingError, which calls the text `name`, for a string without a tokenizer and for ids that are none.
    """
    if not isinstance(text, str):
        return checked_ids(text, model.config.vocab_size, name)
    if model.tokenizer is None:
        rule = "token ids, because the checkpoint has no tokenizer.json"
        raise SettingError(name, text, rule, f"give the {name.partition('[')[0]} as token ids")
    mask = model.config.mask_token_id
    # of the tokenizer's calls only encode_batch releases the GIL, which a whole book takes for seconds
    [encoded] = model.tokenizer.encode_batch([text], add_special_tokens=special)
    if mask in encoded.ids:
        [encoded] = without_mask(model.tokenizer, mask).encode_batch([text], add_special_tokens=special)
    return tuple(encoded.ids)


@functools.lru_cache(maxsize=4)
def without_mask(tokenizer: tokenizers.Tokenizer, mask_token_id: int) -> tokenizers.Tokenizer:
    """The same tokenizer, to which the mask token's name is text, unless the mask is an ordinary token that has to do
    with other tokens' merges; cached, because a large one takes more than a tenth of a second."""
    raw = json.loads(tokenizer.to_str())
    found = next((token for token in raw["added_tokens"] if token["id"] == mask_token_id), None)
    if found is None:
        return tokenizer
    vocab, name = raw["model"]["vocab"], found["content"]
    found["content"] = _NO_TEXT  # in its place, because the library numbers tokens by their order
    if isinstance(vocab, list):  # a unigram model's pieces and scores
        raw["model"]["vocab"] = [[_NO_TEXT if piece == name else piece, score] for piece, score in vocab]
    elif name in vocab:
        vocab[_NO_TEXT] = vocab.pop(name)
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def checked_ids(ids: Iterable[int], vocab_size: int, name: str) -> tuple[int, ...]:
    """The ids as a tuple of int. Raises SettingError for one that is no integer or not in [0, `vocab_size`)."""
    rule = f"a token id in [0, {vocab_size - 1}]"
    found = []
    for place, i in enumerate(ids):
        number = i if type(i) is int else _integer(i)
        if not 0 <= number < vocab_size:
            raise SettingError(f"{name}[{place}]", i, rule, "was another tokenizer used?")
        found.append(number)
    return tuple(found)


def _integer(value: object) -> int:
    """The integer that a value of any library is, -1 where it is none."""
    # PyTorch's booleans, and NumPy's before 2.3, can index too
    if isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
        return -1
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1


def per_prompt(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """The settings of each prompt, where `params` are one for all, one per prompt, or None for the defaults."""
    check_prompts(prompts)
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"there are {len(params)} params for {len(prompts)} prompts; give one, or one per prompt")
    return list(params)
