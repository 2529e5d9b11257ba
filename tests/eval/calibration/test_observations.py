"""What was proposed, against the steps of the text as decoding shows them."""

from typing import Any

import numpy as np
import torch

from twotower.decoding.generate import stream
from twotower.decoding.params import SamplingParams
from twotower.eval.answering import questions
from twotower.eval.calibration.observations import observe
from twotower.model.two_tower import TwoTower


def test_observations_are_the_proposals_that_decoding_made(model: TwoTower, asking: Any) -> None:
    params = SamplingParams(temperature=0.0, seed=0, confidence_threshold=0.3, block_size=8, past_positions=True)
    [question] = questions(model, asking("exact", length=16))[1:2]
    settled = params.settled(8, model.sampling)
    found = observe(model, [question], settled)
    mask = model.config.mask_token_id

    seen, text = [], []
    ids = list(question.prompt_ids)
    blocks: list[list[Any]] = [[]]
    for output in stream(model, ids, SamplingParams(max_new_tokens=16, confidence_threshold=0.3), every_step=True):
        blocks[-1].append(output.block)
        if output.block.t == 0:
            text += output.block.ids
            blocks.append([])
    context = model.context_logits([[*ids, *text]])[0, len(ids) - 1 : -1].argmax(-1).tolist()
    for number, views in enumerate(blocks[:-1]):
        state = model.prefill([[*ids, *text[: number * 8]]])
        before = [mask] * 8
        for view in views:
            best = model.denoise([before], state)[0].softmax(-1).max(-1)
            for i in (i for i, token in enumerate(before) if token == mask):
                wrong = int(best.indices[i]) != context[number * 8 + i]
                seen.append((float(best.values[i]), i, before.count(mask), wrong))
            before = list(view.ids)
    probability, place, masked, wrong = (np.array(column) for column in zip(*seen, strict=True))
    assert len(found.place) == len(seen) > 16
    assert found.place.tolist() == place.tolist()
    assert found.masked.tolist() == masked.tolist()
    assert found.wrong.tolist() == wrong.tolist()
    assert wrong.any()
    torch.testing.assert_close(torch.tensor(found.probability), torch.tensor(probability).float(), rtol=1e-5, atol=1e-7)


def test_places_behind_the_end_of_an_answer_are_left_out(model: TwoTower, asking: Any) -> None:
    params = SamplingParams(temperature=0.0, seed=0, block_size=8, past_positions=True).settled(8, model.sampling)
    [question] = questions(model, asking("exact", length=3))[:1]
    assert observe(model, [question], params).place.max() == 2
