"""What drafters of mode `verified` take and give. Letters: b rows, r rows of one drafter, s places of a block,
v vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.decoding.drafting.written import Written
from twotower.decoding.shaping import Shaping
from twotower.decoding.step import RowBatch
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


@dataclasses.dataclass(frozen=True)
class VerifiedRows(RowBatch):
    """Rows whose context holds all their tokens except the `newest` (b), which is empty before the first tokens;
    `produced` (b) counts each row's new tokens, and `written` (b) has them behind its prompt's."""

    shaping: Shaping
    produced: tuple[int, ...]
    written: tuple[Written, ...]
    newest: tuple[int, ...] = ()

    @property
    def joins(self) -> bool:
        return bool(self.newest)

    @property
    def num_known(self) -> int:
        """Places of a block that are decided before it is drafted: that of the newest token, if there is one."""
        return 1 if self.newest else 0

    def most(self, place: int) -> int:
        """The most places that the next block of a row may have: S, or fewer where fewer tokens are left to write. The
        newest token takes one place, and the token after an accepted draft needs none."""
        request = self.requests[place]
        left = request.max_new_tokens - self.produced[place] - 1 + self.num_known
        return max(1, min(request.block_size, left))


class Proposal(NamedTuple):
    """A drafter's blocks for some rows: ids (r, s) int64 on the context tower's device, the newest tokens first where
    there are any, and how many places of each count, `widths` (r). A row whose width is that of the newest token alone
    has no draft.

    `probabilities` (r, s, v) are those that the ids were drawn from; None says that nothing was drawn: each id is what
    the drafter proposes there with probability 1. `blocks` are the places that count as lists, where the host made
    them.
    """

    ids: Tensor
    widths: tuple[int, ...]
    probabilities: Tensor | None = None
    blocks: tuple[list[int], ...] | None = None


class Drafter(Protocol):
    """The function of a drafter's module. To write another drafter, write a module with it and list it in
    `decoding.drafters`."""

    def propose(self, model: TwoTower, rows: VerifiedRows, places: Sequence[int], /) -> Proposal:
        """Blocks for the rows at `places`, at most `rows.most(place)` wide. Reads, and writes nothing.

        A place's id, or the distribution that it is drawn from, may depend on what stands before the block and on ids
        before it in the block if `probabilities` is None, and otherwise not on what was drawn in the block: speculative
        sampling is exact only then.
        """
        ...


class Draft(NamedTuple):
    """The blocks to verify: ids (b, s) int64, the places of each that count (b), and the drafter's name, "" for a row
    without a draft. The `drawn` rows (r) were drawn from `probabilities` (r, s, v), None where there are none.
    `blocks` are the places that count as lists, None where the host doesn't know all of them."""

    ids: Tensor
    widths: tuple[int, ...]
    drafters: tuple[str, ...]
    drawn: tuple[int, ...] = ()
    probabilities: Tensor | None = None
    blocks: tuple[list[int], ...] | None = None


def certain(model: TwoTower, rows: VerifiedRows, places: Sequence[int], drafts: Sequence[Sequence[int]]) -> Proposal:
    """A proposal of given tokens for the rows at `places`, none for an empty draft; each is cut to what its row has
    room for and behind the first token that ends the text."""
    blocks = []
    for place, draft in zip(places, drafts, strict=True):
        known = [rows.newest[place]] if rows.newest else []
        draft = draft[: rows.most(place) - len(known)]
        if not rows.requests[place].params.ignore_eos:
            end = next((n for n, i in enumerate(draft, 1) if i in model.config.eos_token_ids), len(draft))
            draft = draft[:end]
        blocks.append([*known, *draft])
    size = max(map(len, blocks))
    table = [block + [0] * (size - len(block)) for block in blocks]
    # the dtype is said, because a list of empty lists has none of its own
    ids = to_device(torch.tensor(table, dtype=torch.int64).view(len(blocks), size), model.context_device)
    return Proposal(ids, tuple(map(len, blocks)), blocks=tuple(blocks))
