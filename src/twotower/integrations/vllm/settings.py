"""What a server and its requests say about modes: `--additional-config` and `vllm_xargs`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from twotower.decoding.drafters import draft_sources
from twotower.errors import SettingError, check_flag

AR, VERIFIED, DIFFUSION = "ar", "verified", "diffusion"
# What `--speculative-config` names as its model
DRAFTER = "twotower.integrations.vllm.drafter.TwoTowerDrafter"
# What to start vLLM with for a mode
NEEDED = {
    VERIFIED: (
        f'''start vLLM with --speculative-config '{{"method": "custom_class", "model": "{DRAFTER}", '''
        """"num_speculative_tokens": 16}\'"""
    ),
    DIFFUSION: """start vLLM with --additional-config '{"twotower": {"denoiser": true}}'""",
}
_ELSEWHERE = "twotower serve has the other modes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The object `twotower` in `--additional-config`, and whether vLLM has this package's drafter (`drafts`).

    `mode` is that of requests that name none: by default `verified` where vLLM has the drafter, else `ar`. `drafter`
    names where drafts come from, as `SamplingParams.drafter`; None means what the checkpoint says. `denoiser` loads
    the denoiser, which `diffusion` needs.
    """

    mode: str = AR
    drafter: str | None = None
    denoiser: bool = False
    drafts: bool = False

    @classmethod
    def of(cls, additional: Mapping[str, Any], *, drafts: bool) -> Self:
        """The settings of a server. Raises SettingError for one that is unknown or that this server can't have."""
        given = additional.get("twotower", {})
        names = ("mode", "drafter", "denoiser")
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            raise SettingError("twotower", given, f"an object with {', '.join(names)}", "in --additional-config")
        settings = cls(**{"mode": VERIFIED if drafts else AR, **given}, drafts=drafts)
        check_flag("denoiser", settings.denoiser)
        settings.mode_of(None)
        drafter = settings.drafter
        if drafter is not None:
            if not isinstance(drafter, str):
                raise SettingError("drafter", drafter, "a text such as 'ngram'")
            draft_sources(drafter)
            if not drafts:
                raise SettingError("drafter", drafter, "left out without a drafter in vLLM", NEEDED[VERIFIED])
        return settings

    def mode_of(self, request: Mapping[str, Any] | None) -> str:
        """The mode of a request with these `vllm_xargs`. Raises SettingError for one that this server doesn't have."""
        mode = (request or {}).get("mode", self.mode)
        there = [AR, *([VERIFIED] if self.drafts else []), *([DIFFUSION] if self.denoiser else [])]
        if mode in there:
            return str(mode)
        if mode in (VERIFIED, DIFFUSION):
            raise SettingError("mode", mode, f"{' or '.join(there)} on this server", NEEDED[mode])
        raise SettingError("mode", mode, f"one of {', '.join((AR, VERIFIED, DIFFUSION))}", _ELSEWHERE)
