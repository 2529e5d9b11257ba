"""Log-probabilities of prompts' own tokens, which an engine reads off the passes that absorb them."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from twotower.decoding.modes import MODES
from twotower.decoding.output import Generation, StepOutput, TokenScore
from twotower.decoding.params import SamplingParams
from twotower.decoding.scoring import score
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.pages import PAGE_SIZE
from twotower.model.two_tower import TwoTower


def engine(model: TwoTower, **config: int) -> Engine:
    return Engine(model, EngineConfig(**{"state_bytes": 1 << 20, "snapshot_bytes": 1 << 16, **config}))


def add(e: Engine, prompt: Sequence[int], num_new: int = 3, mode: str = "ar", *, num_top: int | None = 2) -> str:
    """Adds a request that asks for its prompt's scores unless `num_top` is None."""
    request = e.prepare(prompt, SamplingParams(mode=mode, max_new_tokens=num_new))
    return e.add_request(request._replace(prompt_logprobs=num_top))


def outputs(e: Engine) -> list[StepOutput]:
    """All outputs until nothing is unfinished."""
    found = []
    while e.has_work:
        found += e.step()
    return found


def scores(found: list[StepOutput]) -> dict[str, tuple[TokenScore, ...]]:
    """By request; none has given them twice."""
    told = [(output.request_id, output.prompt_scores) for output in found if output.prompt_scores]
    assert len(told) == len(dict(told))
    return dict(told)


def assert_scored(model: TwoTower, ids: Sequence[int], ours: Sequence[TokenScore]) -> None:
    """That these are the context tower's scores of all ids, with two of the likeliest."""
    assert [token.id for token in ours] == list(ids)
    assert ours[0] == TokenScore(ids[0])
    [expected] = score(model, [ids[1:]], [ids[:1]], num_top=2)
    # float32 sums in another order, where other chunks are absorbed
    assert [token.logprob for token in ours[1:]] == pytest.approx(expected.logprobs, abs=2e-5)
    assert [[i for i, _ in token.top] for token in ours[1:]] == [[i for i, _ in top] for top in expected.top]


PROMPTS = [[4 + (i * 7 + j * j) % 30 for j in range(length)] for i, length in enumerate((1, 2, 40, 77, 5))]


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("apart", [False, True])
def test_scores_come_before_the_text_whatever_else_is_absorbed(tiny: Callable, mode: str, apart: bool) -> None:
    model = tiny("M*-E")
    plain = engine(model, max_num_requests=3, prompt_chunk=16, commits_apart=apart)
    e = engine(model, max_num_requests=3, prompt_chunk=16, commits_apart=apart)
    texts = plain.generate(PROMPTS, SamplingParams(mode=mode, max_new_tokens=9))
    names = [add(e, prompt, 9, mode) for prompt in PROMPTS]
    found = outputs(e)
    for name, prompt, text in zip(names, PROMPTS, texts, strict=True):
        own = [output for output in found if output.request_id == name]
        assert_scored(model, prompt, own[0].prompt_scores)
        assert not own[0].tokens
        last: Generation | None = own[-1].result
        assert last is not None
        assert last.token_ids == text.token_ids
    assert len(scores(found)) == len(PROMPTS)


def test_a_prompt_that_is_cached_is_read_again_to_be_scored_and_then_continued_from_the_cache(tiny: Callable) -> None:
    model, prompt = tiny("M*-E"), PROMPTS[3]
    e = engine(model)
    e.generate([prompt], SamplingParams(mode="ar", max_new_tokens=2))
    name = add(e, prompt)
    other = add(e, prompt, num_top=None)
    found = outputs(e)
    assert_scored(model, prompt, scores(found)[name])
    results = {output.request_id: output.result for output in found if output.result is not None}
    assert [results[i].stats.num_cached_tokens for i in (name, other)] == [0, len(prompt)]
    assert e.stats().cache_query_tokens == 2 * len(prompt), "what must be read isn't looked up"


def test_without_new_tokens_the_scores_are_all_there_is(tiny: Callable) -> None:
    model = tiny("M*-E")
    e = engine(model, max_num_requests=2, prompt_chunk=8)
    names = [add(e, prompt, 0, mode) for prompt in PROMPTS for mode in ("ar", "mock_ar", "diffusion")]
    found = outputs(e)
    assert sorted(output.request_id for output in found) == sorted(names)
    for output in found:
        place = names.index(output.request_id)
        assert_scored(model, PROMPTS[place // 3], output.prompt_scores)
        assert output.result is not None
        assert (output.result.token_ids, output.result.finish_reason) == ([], "length")
    e.clear_cache()
    assert e.stats().bytes_used == 0


def test_a_prompt_whose_state_is_dropped_midway_is_scored_once(tiny: Callable) -> None:
    """Older texts grow and need its pages."""
    model = tiny("llama")
    page = engine(model)._pool.page_bytes
    e = engine(model, state_bytes=11 * page, snapshot_bytes=0, prompt_chunk=8, max_num_requests=3)
    old = [add(e, [5] * 8, 60, num_top=None) for _ in range(2)]
    for _ in range(8):
        e.step()
    name = add(e, PROMPTS[3][:60], 3)
    found = outputs(e)
    assert e.stats().num_preemptions > 0
    assert_scored(model, PROMPTS[3][:60], scores(found)[name])
    assert {output.request_id for output in found if output.result is not None} == {*old, name}


def test_who_leaves_while_it_is_scored_frees_its_pages(tiny: Callable) -> None:
    e = engine(tiny("M*-E"), prompt_chunk=8, snapshot_bytes=0)
    name = add(e, PROMPTS[3])
    e.step()
    assert e.stats().bytes_used > 0
    e.abort(name)
    assert (e.stats().bytes_used, e.has_work, e.step()) == (0, False, [])


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that tensors of PyTorch's operations have, `now` and at `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return found

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def test_scoring_takes_no_memory_but_the_budgets(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of 300 tokens with 16 texts each: the keys of one prompt are 77 kB, and a pass has more to hold than
    the logits of 16 places."""
    monkeypatch.setattr("twotower.decoding.scoring._LOGITS", 16 * 2000)
    model = tiny("M*-E", vocab_size=2000)

    def most(num_top: int | None) -> int:
        with Allocations() as allocated:
            e = engine(model, max_num_requests=8, prompt_chunk=64)
            empty = allocated.now
            for k, i in itertools.product(range(4), range(16)):
                add(e, [4 + (k + j * j) % 30 for j in range(300)], 2, num_top=None if i else num_top)
            assert allocated.now == empty, "who waits has no tensors"
            told, used = 0, 0
            while e.has_work:
                told += sum(bool(output.prompt_scores) for output in e.step())
                used = max(used, e.stats().bytes_used)
            assert told == (0 if num_top is None else 4)
            assert 4 * 300 / PAGE_SIZE * e._pool.page_bytes < used <= e.config.state_bytes, "what it shows is in use"
            return allocated.most - empty

    plain, scored = most(None), most(1)
    # Of each place that is not told yet: its id, its log-probability, whether it is the likeliest, and who is.
    assert scored < plain + 4 * 300 * 40


def test_scoring_that_fails_fails_the_request_and_frees_its_pages(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, strange = tiny("M*-E"), RuntimeError("no such logits")
    e = engine(model, snapshot_bytes=0)

    def broken(*_: object) -> None:
        raise strange

    monkeypatch.setattr("twotower.decoding.scoring.score_places", broken)
    name = add(e, PROMPTS[3])
    assert [(output.request_id, output.error, output.prompt_scores) for output in outputs(e)] == [(name, strange, ())]
    assert e.stats().bytes_used == 0
    monkeypatch.undo()
    name = add(e, PROMPTS[3])
    assert_scored(model, PROMPTS[3], scores(outputs(e))[name])
