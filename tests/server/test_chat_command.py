"""`twotower chat --url` with a server of ours: its steps are watched."""

import pytest
from typer.testing import CliRunner

from twotower.cli.conversation.answering import AnswerSettings, Said
from twotower.cli.conversation.remote import RemoteModel
from twotower.cli.main import app as command
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.server.app import make_app
from twotower.server.config import ServerConfig


def test_the_blocks_of_a_server_of_ours_are_seen(url, model):
    params = SamplingParams(max_new_tokens=20, temperature=0.0)
    remote = RemoteModel(url, None, None)
    assert not remote.is_plain
    moments = list(
        remote.moments([Said("user", "é")], AnswerSettings(params, frozenset({"max_new_tokens", "temperature"})))
    )
    expected = generate(model, ["[user]éa"], params)[0]
    assert "".join(moment.text for moment in moments) == expected.text
    seen = [moment.places for moment in moments if moment.places]
    assert all(len(places) in (8, 4) and None in places for places in seen)
    assert any(place is not None for places in seen for place in places)
    end = moments[-1].end
    assert (end.num_tokens, end.denoiser_calls) == (20, expected.stats.denoiser_calls)
    assert end.max_context == 2000


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_without_a_template_the_command_chats_in_the_plain_form(engine, serve, keys):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), api_keys=keys))) as served:
        options = ["chat", "--url", served.url, "--mode", "ar", "--max-new-tokens", "4", "--temperature", "0"]
        options += [part for key in keys for part in ("--api-key", key)]
        result = CliRunner().invoke(command, options, input="é\n")
        assert result.exit_code == 0, result.output
        assert "no chat template" in result.stderr
        assert "ar: 4 tokens" in result.stderr
        if keys:
            refused = CliRunner().invoke(command, options[:-2], input="é\n")
            assert refused.exit_code == 2
            assert "--api-key gives one" in refused.stderr
