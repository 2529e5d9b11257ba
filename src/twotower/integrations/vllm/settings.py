"""What a server and its requests say about modes: `--additional-config` and `vllm_xargs`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from twotower.decoding.drafters import draft_sources
from twotower.errors import SettingError

AR, VERIFIED = "ar", "verified"
# What `--speculative-config` names as its model
DRAFTER = "twotower.integrations.vllm.drafter.TwoTowerDrafter"
_WITH_DRAFTER = (
    f'''start vLLM with --speculative-config '{{"method": "custom_class", "model": "{DRAFTER}", '''
    """"num_speculative_tokens": 16}\'"""
)
_ELSEWHERE = "twotower serve has the other modes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The object `twotower` in `--additional-config`.

    `mode` is that of requests that name none: by default `verified` where vLLM has this package's drafter, else `ar`.
    `drafter` names where drafts come from, as `SamplingParams.drafter`; None means what the checkpoint says.
    """

    mode: str = AR
    drafter: str | None = None

    @classmethod
    def of(cls, additional: Mapping[str, Any], *, drafts: bool) -> Self:
        """The settings of a server, which has this package's drafter if `drafts`.

        Raises SettingError for one that is unknown or that this server can't have.
        """
        given = additional.get("twotower", {})
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            raise SettingError("twotower", given, f"an object with {' and '.join(names)}", "in --additional-config")
        mode = _checked_mode(given.get("mode", VERIFIED if drafts else AR), drafts)
        drafter = given.get("drafter")
        if drafter is not None:
            if not isinstance(drafter, str):
                raise SettingError("drafter", drafter, "a text such as 'ngram'")
            draft_sources(drafter)
            if not drafts:
                raise SettingError("drafter", drafter, "left out without a drafter in vLLM", _WITH_DRAFTER)
        return cls(mode=mode, drafter=drafter)

    def mode_of(self, request: Mapping[str, Any] | None, *, drafts: bool) -> str:
        """The mode of a request with these `vllm_xargs`. Raises SettingError for one that this server doesn't have."""
        return _checked_mode((request or {}).get("mode", self.mode), drafts)


def _checked_mode(mode: object, drafts: bool) -> str:
    if mode == VERIFIED and not drafts:
        raise SettingError("mode", mode, f"{AR!r} on this server", _WITH_DRAFTER)
    if mode not in (AR, VERIFIED):
        raise SettingError("mode", mode, f"{AR} or {VERIFIED}", _ELSEWHERE)
    return str(mode)
