"""Which replica gets a request, without Ray and without replicas."""

import contextlib
import json
from collections import Counter

import pytest

from twotower.integrations.ray.choice import Fleet, Member, affinity

TURN = {"role": "user", "content": "Who was Ada?"}
ANSWER = {"role": "assistant", "content": "A mathematician."}


def fleet(size, room=100):
    made = Fleet()
    made.update([Member(f"r{i}", f"http://{i}", room) for i in range(size)])
    return made


def key(headers=None, **body):
    return affinity(headers or {}, json.dumps(body).encode())


def test_turns_of_a_chat_have_one_key_and_chats_have_their_own():
    begun = key(messages=[TURN])
    assert key(messages=[TURN, ANSWER, {"role": "user", "content": "When?"}], temperature=0.5) == begun
    assert key(messages=[{"role": "system", "content": "Be brief."}, TURN]) != begun
    assert key(messages=[{"role": "user", "content": "Who was Alan?"}]) != begun


@pytest.mark.parametrize("system", ["system", "instructions"])
def test_the_instructions_of_other_protocols_belong_to_the_beginning(system):
    turns = {"messages": [TURN]} if system == "system" else {"input": [TURN]}
    assert key(**turns, **{system: "a"}) != key(**turns, **{system: "b"})
    assert key(input="a", instructions="c") != key(input="b", instructions="c")


def test_prompts_that_begin_alike_have_one_key():
    assert key(prompt="a" * 512 + "b") == key(prompt="a" * 512 + "c")
    assert key(prompt="ab") != key(prompt="ac")
    assert key(prompt=[1, 2, 3]) == key(prompt=[[1, 2, 3], [4]]) != key(prompt=[1, 2, 4])


def test_a_session_and_a_key_of_a_cache_win_over_the_prompt():
    assert key({"x-session-id": "s"}, prompt="a") == key({"x-session-id": "s"}, prompt="b") != key(prompt="a")
    assert key(prompt_cache_key="k", prompt="a") == key(prompt_cache_key="k", prompt="b") != key(prompt="a")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"{}", b'{"prompt": ""}', b'{"messages": []}', b'{"prompt": 3}'])
def test_a_body_without_a_prompt_has_no_key(body):
    assert affinity({}, body) is None


def test_requests_without_a_key_go_round():
    three = fleet(3)
    names = []
    for _ in range(6):
        [first, *_] = three.order(None)
        names.append(first.name)
        with three.carry(first):
            pass
    assert names == ["r0", "r1", "r2"] * 2


def test_a_key_keeps_its_replica_when_another_comes_or_goes():
    keys = [str(number).encode() for number in range(300)]
    three, four = fleet(3), fleet(4)
    homes = {one: three.order(one)[0].name for one in keys}
    assert min(Counter(homes.values()).values()) > 60
    moved = [one for one in keys if four.order(one)[0].name != homes[one]]
    assert {four.order(one)[0].name for one in moved} == {"r3"}
    assert 40 < len(moved) < 110
    three.lose(three.members[0])
    assert all(three.order(one)[0].name == homes[one] for one in keys if homes[one] != "r0")


def test_no_replica_gets_more_than_a_quarter_above_its_share_of_one_key():
    three = fleet(3)
    with contextlib.ExitStack() as running:
        for _ in range(48):
            running.enter_context(three.carry(three.order(b"one")[0]))
        counts = sorted(three.running(member) for member in three.members)
        assert counts[-1] == 20
        assert sum(counts) == 48
        # what has no key goes to the one with the fewest
        assert three.running(three.order(None)[0]) == counts[0]


def test_a_full_replica_gets_nothing_and_a_lost_one_nothing_until_it_is_back():
    two = fleet(2, room=1)
    [first, second] = two.order(b"one")
    with two.carry(first):
        assert two.order(b"one") == [second]
        with two.carry(second):
            assert two.order(b"one") == []
    two.lose(first)
    assert two.order(b"one") == [second]
    two.update([first, second])
    assert two.order(b"one") == [first, second]
