"""Which modes and drafters a server inside vLLM has, and what a request may ask of it."""

import pytest

from twotower.errors import SettingError
from twotower.integrations.vllm.settings import ServerSettings


def test_a_server_with_a_drafter_verifies_and_one_without_doesnt() -> None:
    assert ServerSettings.of({}, drafts=False) == ServerSettings(mode="ar", drafts=False)
    assert ServerSettings.of({}, drafts=True) == ServerSettings(mode="verified", drafts=True)
    given = {"twotower": {"mode": "ar", "drafter": "prompt,ngram"}}
    assert ServerSettings.of(given, drafts=True) == ServerSettings(mode="ar", drafter="prompt,ngram", drafts=True)


def test_a_request_has_the_servers_mode_or_its_own() -> None:
    settings = ServerSettings(mode="verified", drafts=True, denoiser=True)
    assert settings.mode_of(None) == "verified"
    assert settings.mode_of({"session_id": "a"}) == "verified"
    assert settings.mode_of({"mode": "ar"}) == "ar"
    assert settings.mode_of({"mode": "diffusion"}) == "diffusion"


@pytest.mark.parametrize(
    ("additional", "drafts", "words"),
    [
        (
            {"twotower": {"mode": "verified"}},
            False,
            "must be ar on this server; start vLLM with --speculative-config",
        ),
        (
            {"twotower": {"mode": "diffusion"}},
            True,
            "must be ar or verified on this server; start vLLM with --additional",
        ),
        ({"twotower": {"mode": "auto"}}, True, "must be one of ar, verified, diffusion; twotower serve has the other"),
        ({"twotower": {"denoiser": 1}}, True, "denoiser is 1, must be True or False"),
        ({"twotower": {"mood": "ar"}}, False, "must be an object with mode, drafter, denoiser"),
        ({"twotower": "ar"}, False, "must be an object with mode, drafter, denoiser"),
        ({"twotower": {"drafter": "ngram"}}, False, "must be left out without a drafter in vLLM"),
        ({"twotower": {"drafter": "oracle"}}, True, "must be one of denoiser, ngram, prompt"),
        ({"twotower": {"drafter": 1}}, True, "must be a text"),
    ],
)
def test_what_a_server_cant_have_is_refused_in_a_sentence(additional, drafts, words) -> None:
    with pytest.raises(SettingError, match=words):
        ServerSettings.of(additional, drafts=drafts)


@pytest.mark.parametrize("mode", ["mock_ar", "AR", 1, None, ""])
def test_a_mode_that_isnt_there_is_refused(mode) -> None:
    with pytest.raises(SettingError, match="must be one of ar, verified, diffusion"):
        ServerSettings(drafts=True).mode_of({"mode": mode})


def test_the_advice_is_a_command_that_can_be_copied() -> None:
    with pytest.raises(SettingError) as raised:
        ServerSettings().mode_of({"mode": "verified"})
    assert str(raised.value).endswith(
        """--speculative-config '{"method": "custom_class", """
        """"model": "twotower.integrations.vllm.drafter.TwoTowerDrafter", """
        """"num_speculative_tokens": 16}'"""
    )
    with pytest.raises(SettingError) as raised:
        ServerSettings().mode_of({"mode": "diffusion"})
    assert str(raised.value).endswith("""--additional-config '{"twotower": {"denoiser": true}}'""")
