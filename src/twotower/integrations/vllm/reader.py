"""config.json of two towers, read where vLLM asks transformers for it. Needs nothing of vLLM's."""

from typing import Any

from transformers import AutoConfig, NemotronHConfig

from twotower.integrations.vllm.config import RELEASED, for_vllm
from twotower.integrations.vllm.versions import check_version, installed


class TwoTowerReader(NemotronHConfig):
    """Reads every config.json of model_type "nemotron_h"; those that aren't two towers as before."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A NemotronHConfig. Raises ValueError for two towers that this vLLM can't serve."""
        if RELEASED in (config_dict.get("architectures") or ()):
            check_version(installed())
            config_dict = for_vllm(config_dict)
        return NemotronHConfig.from_dict(config_dict, **kwargs)


def register_reader() -> None:
    """Has transformers read two towers; a second call changes nothing."""
    AutoConfig.register("nemotron_h", TwoTowerReader, exist_ok=True)
