"""What the denoiser proposes while it fills blocks, and where the context tower would have written something else.
Letters: n observations, j steps of a block, s its places, v vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.decoding.scoring import score
from twotower.eval.answering import Question, batches, request
from twotower.model.two_tower import TwoTower


class Observations(NamedTuple):
    """Proposals for masked places (n,): their probability, their place in the block and the number of masks then, both
    int64, and whether they are wrong: the context tower, greedy after the final text before the place, would have
    written another token."""

    probability: np.ndarray
    place: np.ndarray
    masked: np.ndarray
    wrong: np.ndarray

    def join(self, others: "Observations") -> "Observations":
        """Both."""
        return Observations(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


def observe(model: TwoTower, questions: Sequence[Question], params: SamplingParams) -> Observations:
    """The proposals for every mask at every step, as the questions are answered under settled `params` with a seed.

    Places behind the end of an answer are left out: what stands there is dropped.
    """
    size = params.block_size
    assert size is not None
    found = [_nothing()]
    for batch in batches([len(q.prompt_ids) for q in questions]):
        prompts = [questions[i].prompt_ids for i in batch]
        own = [request(questions[i].example, params, i) for i in batch]
        answers = generate(model, prompts, own)
        # Once more up to the end of the last block, whose other tokens depend on those that an answer drops.
        lengths = [-(-len(a.token_ids) // size) * size for a in answers]
        on = dataclasses.replace(params, ignore_eos=True)
        whole = [dataclasses.replace(on, max_new_tokens=n, seed=p.seed) for p, n in zip(own, lengths, strict=True)]
        filled = generate(model, prompts, whole)
        scores = score(model, [f.token_ids for f in filled], prompts, num_top=1)
        for prompt, answer, text, scored in zip(prompts, answers, filled, scores, strict=True):
            greedy = [top[0][0] for top in scored.top][: len(answer.token_ids)]
            found.append(_replayed(model, prompt, text.token_ids, text.commit_steps, greedy, size))
    return Observations(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _nothing() -> Observations:
    return Observations(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


@torch.inference_mode()
def _replayed(
    model: TwoTower, prompt: Sequence[int], ids: list[int], steps: list[int], greedy: list[int], size: int
) -> Observations:
    """The proposals of all steps of whole blocks of `ids`, at the places for which `greedy` has a token."""
    state = model.prefill([prompt], capacity=len(prompt) + len(ids))
    found = [_nothing()]
    for first in range(0, len(greedy), size):
        block = torch.tensor(ids[first : first + size])  # (s,)
        at = torch.tensor(steps[first : first + size])
        masked = at[None] >= at.unique()[:, None]  # (j, s)
        rows = torch.where(masked, model.config.mask_token_id, block)
        best = model.denoise(rows, state.select([0] * len(rows))).cpu().softmax(-1).max(-1)  # (j, s, v)
        wanted = torch.tensor(greedy[first : first + size])
        row, place = masked[:, : len(wanted)].nonzero(as_tuple=True)  # (n,)
        columns = (
            best.values[row, place],
            place,
            masked.sum(-1)[row],
            best.indices[row, place] != wanted[place],
        )
        found.append(Observations(*(column.numpy() for column in columns)))
        state = model.extend(block[None], state)
    return Observations(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
