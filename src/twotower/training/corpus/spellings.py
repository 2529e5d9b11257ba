"""What tells the vocabulary of a corpus from others: how some of its tokens are spelled.

Spellings and no digest of all tokens, because a vocabulary gets and loses added tokens, such as the mask that `init`
adds or a chat's markers, and its corpora stay good.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tokenizers

# Two vocabularies of one kind agree on few ids beyond characters and the most frequent words.
_SAMPLES = 256


class Difference(NamedTuple):
    """A token of a corpus that is another in a checkpoint: its id and both spellings, None where there is no token."""

    token_id: int
    held: str
    found: str | None


def spellings(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """The spelling of some tokens by their ids, which are spread evenly; of no added token."""
    added = tokenizer.get_added_tokens_decoder()
    # Names with a NUL stand for ids without a token, see `append_mask`.
    own = sorted((i, name) for name, i in tokenizer.get_vocab().items() if i not in added and "\0" not in name)
    places = np.unique(np.linspace(0, len(own) - 1, min(_SAMPLES, len(own)), dtype=np.int64))
    return dict(own[place] for place in places)


def difference(held: Mapping[int, str], tokenizer: tokenizers.Tokenizer) -> Difference | None:
    """The first token that a corpus spells otherwise than a tokenizer does; None where all are the same."""
    for i, name in held.items():
        found = tokenizer.id_to_token(i)
        if found != name:
            return Difference(i, name, found)
    return None
