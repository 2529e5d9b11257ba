"""Stop strings in a growing text, also those that name control tokens."""

import random
from collections.abc import Callable, Sequence

import pytest
import tokenizers
import torch

from twotower.decoding.generate import generate, stream
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.decoding.stops import StopFinder
from twotower.engine.engine import Engine

END, MASK = 2, 3


@pytest.fixture
def finder(byte_tokenizer: tokenizers.Tokenizer) -> Callable[[Sequence[str]], StopFinder]:
    return lambda stops: StopFinder(byte_tokenizer, stops)


def written(found: StopFinder, *parts: str | int) -> list[int | None]:
    """What is found after each part: a text, or the id of a control token."""
    ends = []
    for part in parts:
        found.push(*((10, part) if isinstance(part, str) else (part, "")))
        stop = found.find()
        ends.append(None if stop is None else stop.end)
    return ends


def test_the_earliest_stop_string_is_found_where_it_is_complete(finder):
    assert written(finder(["cde", "d"]), "ab", "c", "de") == [None, None, 2]
    assert written(finder(["d", "cde"]), "abcde") == [2]
    assert written(finder([]), "ab", END) == [None, None]


@pytest.mark.parametrize(
    ("stop", "parts", "end"),
    [
        ("</s>", ("ab", END), 2),
        ("</s>", ("ab</s>",), 2),
        ("</s>\n", ("ab", END, "x"), None),
        ("</s>\n", ("ab", END, "\n"), 2),
        ("\n</s>", ("ab\n", END), 2),
        ("b</s><s>a", ("ab", END, 1, "a"), 1),
        ("</s>", ("ab", MASK, "c", END), 3),
        ("/s", ("ab", END), None),
        ("<s", ("ab", 1), None),
    ],
)
def test_a_control_token_counts_as_its_name_though_the_text_leaves_it_out(finder, stop, parts, end):
    assert written(finder([stop]), *parts)[-1] == end


def test_what_may_begin_a_stop_string_is_pending(finder):
    found = finder(["x</s>yz", "q"])
    pending = []
    for part in ("ax", END, "y", "x", "b"):
        found.push(*((part, "") if part == END else (10, part)))
        pending.append(found.num_pending)
    assert pending == [1, 1, 2, 1, 0]


@pytest.mark.parametrize("seed", range(50))
def test_what_is_found_and_pending_is_what_a_plain_search_finds(seed):
    rng = random.Random(seed)
    for _ in range(10):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        least, include = rng.choice([0, 0, 3]), rng.random() < 0.5
        found, text, passed = StopFinder(None, stops, min_tokens=least, include=include), "", 0
        for place in range(12):
            piece = "".join(rng.choices("abc", k=rng.randrange(3)))
            found.push(10, piece)
            text += piece
            passed = len(text) if place < least else passed
            ends = [(i, i + len(s)) for s in stops for i in range(len(text)) if text.startswith(s, i)]
            first = min((pair for pair in ends if pair[1] > passed), default=None)
            stop = found.find()
            assert (None if stop is None else stop.end) == (None if first is None else first[include])
            if first is not None:
                break
            sizes = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
            assert found.num_pending == max(sizes, default=0)


def test_of_two_names_the_longer_is_meant():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    tokenizer.add_special_tokens(["<a", "<a>"])
    assert written(StopFinder(tokenizer, ["<a>"]), 0, ">", 1) == [None, None, 1]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_control_token_ends_the_text_in_every_mode(mode, tiny, byte_tokenizer):
    model = tiny("M*-E", vocab_size=260)
    model.tokenizer = byte_tokenizer
    with torch.no_grad():  # equal logits: both towers write nothing but token 0, <unk>
        for name in ("lm_head.weight", "context_lm_head.weight"):
            model.released_tensors()[name][:].zero_()
    model.eval()
    params = SamplingParams(mode=mode, max_new_tokens=12, stop=("<unk>",), ignore_eos=True)
    result = generate(model, [[9, 8]], params)[0]
    assert (result.token_ids, result.text, result.finish_reason) == ([0], "", "stop")
    assert "".join(str(piece) for piece in stream(model, [9, 8], params)) == ""
    outputs = Engine(model).generate([[9, 8]], [params])
    assert [(g.token_ids, g.finish_reason) for g in outputs] == [([0], "stop")]
