"""Settings that change the logits of a place by the text before it."""

from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def check_shape(model: TwoTower, params: SamplingParams) -> None:
    """Raises SettingError for settings of tokens that this model can't follow."""
    shapes = ("logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "presence_penalty", "frequency_penalty")
    for name in shapes:
        if getattr(params, name):
            raise SettingError(name, getattr(params, name), "left out for now: no mode follows it yet")
    if params.repetition_penalty not in (None, 1):
        raise SettingError("repetition_penalty", params.repetition_penalty, "1 for now: no mode follows it yet")
