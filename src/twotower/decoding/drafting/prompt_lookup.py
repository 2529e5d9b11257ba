"""Prompt lookup (Saxena 2023): where the end of the text stood before, in the prompt or in what was written since, what
followed it there is the draft. transformers calls it `prompt_lookup_num_tokens`, and vLLM's method "ngram" is the same.
"""

from collections.abc import Sequence

from twotower.decoding.drafting.draft import Proposal, VerifiedRows, certain
from twotower.decoding.drafting.written import Written
from twotower.model.two_tower import TwoTower

# Of the places where the text's last pair of tokens stood before, so many of the latest are looked at.
_MOST_PLACES = 16
# Tokens of a match that are counted: a longer one says hardly more.
_MOST_MATCHED = 32


def propose(model: TwoTower, rows: VerifiedRows, places: Sequence[int]) -> Proposal:
    """What followed the longest suffix of the text, at least a pair of tokens, that occurred before; of equally long
    ones the latest."""
    drafts = [continuation(rows.written[place], rows.most(place)) for place in places]
    return certain(model, rows, places, drafts)


def continuation(written: Written, most: int) -> list[int]:
    """At most `most` tokens of a draft for one text; empty where its end is new."""
    ids, before = written.ids, written.pairs()
    last = written.length - 1
    best, longest = -1, 0
    place = before[last]
    for _ in range(_MOST_PLACES):
        if place < 0:
            break
        matched = 2
        while matched < min(_MOST_MATCHED, place + 1) and ids[place - matched] == ids[last - matched]:
            matched += 1
        if matched > longest:
            best, longest = place, matched
        place = before[place]
    if best < 0:
        return []
    # Twice what matched: a short match is often chance. Behind the text's end, the period goes on.
    period = last - best
    return [ids[best + 1 + n % period] for n in range(min(most, 2 * longest))]
