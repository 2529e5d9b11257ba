"""Log-probabilities: of the decoder's choice, of the context tower's pass, and what evaluation clients read."""

import math

import pytest
import tokenizers

from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.output import Token, TokenScore
from twotower.decoding.params import SamplingParams
from twotower.server.logprobs import chat_logprobs, committed, completion_logprobs
from twotower.server.token_names import TextOffsets, TokenNames


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_chosen_tokens_have_the_probability_they_were_committed_with(client, model, mode):
    settings = {"model": "tiny", "prompt": "a", "max_tokens": 15, "seed": 4, "logprobs": 0}
    settings["extra_body"] = {"mode": mode, "block_size": 6}
    expected = generate(
        model, ["a"], SamplingParams(mode=mode, max_new_tokens=15, seed=4, temperature=1.0, block_size=6)
    )[0]
    shown = client.completions.create(**settings).choices[0].logprobs
    # float32 sums in another order, where what is cached begins elsewhere
    assert shown.token_logprobs == pytest.approx([math.log(c) for c in expected.confidences], abs=1e-5)
    assert len(shown.tokens) == len(shown.text_offset) == 15
    assert shown.top_logprobs is None
    chunks = [c.choices[0].logprobs for c in client.completions.create(**settings, stream=True) if c.choices]
    chunks = [c for c in chunks if c is not None]
    assert [t for c in chunks for t in c.tokens] == shown.tokens
    assert [t for c in chunks for t in c.token_logprobs] == pytest.approx(shown.token_logprobs, abs=1e-5)
    assert [t for c in chunks for t in c.text_offset] == shown.text_offset


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_likeliest_are_those_of_generate_in_every_mode(client, model, mode, stream):
    """Of bytes that have a name of their own; float32 sums in another order, where what is cached begins elsewhere."""
    params = SamplingParams(mode=mode, max_new_tokens=9, seed=4, temperature=1.0, block_size=4, logprobs=5)
    [expected] = generate(model, ["a"], params)
    names = TokenNames(model.tokenizer)
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 9, "seed": 4, "logprobs": 5, "stream": stream}
    ask["extra_body"] = {"mode": mode, "block_size": 4}
    answer = client.completions.create(**ask)
    shown = [c.choices[0].logprobs for c in answer] if stream else [answer.choices[0].logprobs]
    shown = [part for part in shown if part is not None]
    tops = [top for part in shown for top in part.top_logprobs]
    chosen = [(t, p) for part in shown for t, p in zip(part.tokens, part.token_logprobs, strict=True)]
    assert len(tops) == len(expected.top) == 9
    for ours, theirs, (token, logprob) in zip(tops, expected.top, chosen, strict=True):
        likeliest = {names.name(i): pytest.approx(p, abs=1e-4) for i, p in theirs}
        assert ours == {token: pytest.approx(logprob, abs=1e-4)} | likeliest, "the chosen one is always among them"
        assert ours[token] == logprob


def test_echo_has_the_prompt_by_the_context_tower_and_the_text_by_its_mode(http):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "logprobs": 3, "seed": 1, "mode": "diffusion"}
    plain, echoed = (
        http.post("/v1/completions", json=body | {"echo": echo}).json()["choices"][0]["logprobs"]
        for echo in (False, True)
    )
    assert echoed["token_logprobs"][0] is None
    assert echoed["token_logprobs"][2:] == pytest.approx(plain["token_logprobs"], abs=1e-4)
    assert [set(top) for top in echoed["top_logprobs"][2:]] == [set(top) for top in plain["top_logprobs"]]


def test_a_chat_with_the_defaults_has_the_likeliest(client, http):
    """The server's default mode fills blocks."""
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "日本"}], "max_tokens": 12, "logprobs": True}
    for seed in range(4):
        choice = client.chat.completions.create(**ask, seed=seed, top_logprobs=2).choices[0]
        content = choice.logprobs.content
        assert (
            b"".join(bytes(token.bytes or []) for token in content).decode("utf-8", "replace") == choice.message.content
        )
        assert [len(token.top_logprobs) for token in content] == [2] * len(content)
        for token in content:
            assert token.logprob <= token.top_logprobs[0].logprob
            likely = {tuple(top.bytes or ()): top.logprob for top in token.top_logprobs}
            assert likely.get(tuple(token.bytes or ()), token.logprob) == token.logprob
    refused = http.post("/v1/chat/completions", json=ask | {"top_logprobs": 21})
    assert refused.json()["error"]["param"] == "top_logprobs"


@pytest.mark.slow
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["a", "xé", ""])
def test_a_stream_has_the_tops_that_come_at_once(client, prompt, echo):
    ask = {"model": "tiny", "prompt": [prompt, "zab"], "max_tokens": 11, "logprobs": 2, "temperature": 0, "echo": echo}
    ask["extra_body"] = {"mode": "verified", "block_size": 4}
    whole = client.completions.create(**ask).choices
    parts = [c.choices[0] for c in client.completions.create(**ask, stream=True)]
    for choice in whole:
        mine = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        shown = [part.logprobs for part in mine if part.logprobs is not None]
        assert len(shown) > 2
        for name in ("tokens", "text_offset"):
            assert [value for part in shown for value in getattr(part, name)] == getattr(choice.logprobs, name)
        values = [value for part in shown for value in part.token_logprobs]
        for ours, theirs in zip(values, choice.logprobs.token_logprobs, strict=True):
            # float32 sums in another order
            assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-4))
        tops = [top for part in shown for top in part.top_logprobs]
        for ours, theirs in zip(tops, choice.logprobs.top_logprobs, strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-4))


def test_echo_gives_what_evaluation_clients_read(client, model, byte_tokenizer):
    """The request and the reading of lm-evaluation-harness: the log-likelihood of a continuation."""
    context, continuation = byte_tokenizer.encode("xa").ids, byte_tokenizer.encode("b zab").ids
    done = client.completions.create(
        model="tiny", prompt=[context + continuation], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1
    )
    shown = done.choices[0].logprobs
    assert done.choices[0].text.startswith("xab zab")
    log_p = model.context_logits([context + continuation])[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    truth = [log_p[i, t].item() for i, t in zip(places, continuation, strict=True)]
    assert shown.token_logprobs[len(context) : -1] == pytest.approx(truth, abs=1e-4)
    greedy = [
        token == max(top, key=top.get)
        for token, top in zip(shown.tokens[len(context) : -1], shown.top_logprobs[len(context) : -1], strict=True)
    ]
    assert greedy == [log_p[i].argmax().item() == t for i, t in zip(places, continuation, strict=True)]
    assert True in greedy
    assert False in greedy
    assert shown.text_offset[:7] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stream", [False, True])
def test_the_texts_of_a_prompt_share_its_log_probabilities(client, stream):
    """Only the first text reads the prompt to score it: the others are cached, and would be ahead of it."""
    ask = {"model": "tiny", "max_tokens": 5, "logprobs": 2, "temperature": 0, "extra_body": {"mode": "ar"}}
    prompts = ["xé z" * 40, "ab"]
    alone = [client.completions.create(**ask, prompt=prompt, echo=True).choices[0] for prompt in prompts]
    answer = client.completions.create(**ask, prompt=prompts, n=3, echo=True, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    for index in range(6):
        mine, expected = [choice for choice in choices if choice.index == index], alone[index // 3]
        assert "".join(choice.text for choice in mine) == expected.text
        shown = [choice.logprobs for choice in mine if choice.logprobs is not None]
        for name in ("tokens", "text_offset"):
            assert [value for part in shown for value in getattr(part, name)] == getattr(expected.logprobs, name)
        # float32 sums in another order, where what is cached begins elsewhere
        values = [value for part in shown for value in part.token_logprobs]
        assert values[0] is None
        assert values[1:] == pytest.approx(expected.logprobs.token_logprobs[1:], abs=1e-4)


def test_prompt_logprobs_and_those_of_an_echo_have_each_their_number_of_tops(http):
    ask = {"model": "tiny", "prompt": "xab", "max_tokens": 1, "n": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    for choice in http.post("/v1/completions", json=ask).json()["choices"]:
        # and the token itself, where it isn't one of them
        assert [len(top) in (1, 2) for top in choice["logprobs"]["top_logprobs"][1:3]] == [True, True]
        assert [len(entry) in (3, 4) for entry in choice["prompt_logprobs"][1:]] == [True, True]


def test_echo_without_new_tokens_is_the_prompt(client, http):
    done = client.completions.create(model="tiny", prompt="xyz", max_tokens=0, logprobs=0, echo=True)
    assert done.choices[0].text == "xyz"
    assert done.choices[0].logprobs.tokens == ["x", "y", "z"]
    assert done.choices[0].logprobs.token_logprobs[0] is None
    plain = {"model": "tiny", "prompt": "zé", "max_tokens": 3, "echo": True, "mode": "ar", "temperature": 0}
    whole = http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    stream = client.completions.create(
        **{k: v for k, v in plain.items() if k != "mode"}, extra_body={"mode": "ar"}, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == whole
    assert whole.startswith("zé")


def test_chat_logprobs(client):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0}
    ask |= {"logprobs": True, "extra_body": {"mode": "ar"}}
    content = client.chat.completions.create(**ask, top_logprobs=2).choices[0].logprobs.content
    assert [t.token for t in content][:2] == ["b", " "]
    assert content[0].bytes == [ord("b")]
    assert b"".join(bytes(token.bytes) for token in content[2:6]).decode() == "🎉"
    assert content[2].token == r"bytes:\xf0"
    assert [len(t.top_logprobs) for t in content] == [2] * 8
    assert content[0].top_logprobs[0].token == "b"
    plain = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [t.logprob for t in plain] == pytest.approx([t.logprob for t in content], abs=1e-4)
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**ask, stream=True)]
    assert [t.token for part in streamed if part for t in part.content] == [t.token for t in plain]
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**ask, top_logprobs=2, stream=True)]
    found = [t for part in streamed if part for t in part.content]
    assert [[x.token for x in t.top_logprobs] for t in found] == [[x.token for x in t.top_logprobs] for t in content]
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in content], abs=1e-4)


def test_names_of_tokens(byte_tokenizer):
    names = TokenNames(byte_tokenizer)
    byte = byte_tokenizer.encode("é").ids[0]
    assert (names.text(4 + ord("a")), names.name(4 + ord("a"))) == ("a", "a")
    assert (names.text(byte), names.name(byte), names.bytes(byte)) == (None, r"bytes:\xc3", b"\xc3")
    assert (names.text(2), names.name(2), names.bytes(2)) == (None, "</s>", b"")
    assert names.name(10_000) == "<10000>"


@pytest.mark.parametrize("text", ["日本 é", "🎉", " a  b", "é"])
def test_bytes_of_tokens_are_the_text(byte_tokenizer, text):
    for tokenizer in (byte_tokenizer, fallback_tokenizer()):
        names, ids = TokenNames(tokenizer), tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(ids)
        assert b"".join(names.bytes(i, first=place == 0) for place, i in enumerate(ids)).decode() == whole
        offsets = TextOffsets(names, echo=whole)
        # every token is a byte, and begins where the character of that byte does
        expected = [place for place, character in enumerate(whole) for _ in character.encode()]
        assert [offsets.push(i) for i in ids] == expected


@pytest.mark.parametrize("text", ["a b", "ab", "  a", "é a"])
def test_names_of_an_echoed_prompt_are_its_text_where_a_decoder_takes_its_first_space(text):
    tokenizer = fallback_tokenizer()
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    names, ids = TokenNames(tokenizer), tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    tokens = [TokenScore(i, -1.0, False, ((i, -1.0), (2, -2.0))) for i in ids]
    shown = completion_logprobs(names, tokens, TextOffsets(names, echo=text), with_top=True)
    assert "".join(shown["tokens"]) == text.replace("é", r"bytes:\xc3bytes:\xa9")
    places = [text.encode()[:n].decode(errors="ignore") for n in range(len(text.encode()))]
    assert shown["text_offset"] == [0, *map(len, places)]
    assert all(token in top for token, top in zip(shown["tokens"], shown["top_logprobs"], strict=True))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"\xc3a", [0, 1]),  # �a
        (b"\xe6\x97a\xe6\x97\xa5b", [0, 0, 1, 2, 2, 2, 3]),  # �a日b
        (b"\xe6\xf0\x9f\xe6\x97\xa5", [0, 1, 1, 2, 2, 2]),  # ��日
        (b"\x97\xa5a\xff\xc3", [0, 1, 2, 3, 4]),  # ��a��
    ],
)
def test_what_never_becomes_a_character_has_its_place_too(byte_tokenizer, written, expected):
    ids = [4 + value for value in written]
    assert len(byte_tokenizer.decode(ids)) == expected[-1] + 1
    offsets = TextOffsets(TokenNames(byte_tokenizer))
    assert [offsets.push(i) for i in ids] == expected


def fallback_tokenizer():
    """As Llama's: spaces are ▁, and what isn't in the vocabulary is bytes by name."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3} | {f"<0x{value:02X}>": 4 + value for value in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence(steps)
    return made


def test_zero_probability_is_a_number(byte_tokenizer):
    assert committed([Token(1, 0, 0.0)])[0].logprob == -9999.0
    assert math.isfinite(committed([Token(1, 0, 1e-30)])[0].logprob)
    impossible = [TokenScore(100, -math.inf, False, ((100, -math.inf),))]
    names = TokenNames(byte_tokenizer)
    shown = completion_logprobs(names, impossible, TextOffsets(names), with_top=True)
    assert (shown["token_logprobs"], shown["top_logprobs"]) == ([-9999.0], [{"`": -9999.0}])
    [entry] = chat_logprobs(TokenNames(byte_tokenizer), impossible)["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
