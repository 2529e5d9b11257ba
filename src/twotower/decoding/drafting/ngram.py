"""Drafts from the counts of n-grams that a checkpoint comes with, see `model.ngrams`."""

from collections.abc import Sequence

from twotower.decoding.drafting.draft import Proposal, VerifiedRows, certain
from twotower.model.ngrams import NgramTable
from twotower.model.two_tower import TwoTower

# A draft goes on while all of it is kept with at least this chance by the counts: verifying one more place costs about
# a tenth of a pass, and where the counts are right a place saves a whole one.
LEAST_CHANCE = 0.1


def propose(model: TwoTower, rows: VerifiedRows, places: Sequence[int]) -> Proposal:
    """The likeliest token by the counts, place after place, as long as the counts know one and it is likely to stay."""
    assert model.ngrams is not None
    table = model.ngrams
    drafts = [continuation(table, rows.written[place].ids, rows.most(place)) for place in places]
    return certain(model, rows, places, drafts)


def continuation(table: NgramTable, ids: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens of a draft for one text; empty where the counts know no likely one."""
    draft: list[int] = []
    chance = 1.0
    tail = list(ids[: -table.order : -1])  # backwards, as `guess` reads it
    while len(draft) < most:
        guess = table.guess(tail)
        if guess is None:
            break
        chance *= guess.share
        if chance < LEAST_CHANCE:
            break
        draft.append(guess.token)
        tail.insert(0, guess.token)
    return draft
