"""How long the rows of a corpus may be: no longer than the texts that the model was trained on, unless asked for."""

from typing import Any

from twotower.config import TwoTowerConfig
from twotower.errors import SettingError
from twotower.options import option


def past_positions_option() -> Any:
    """The field `past_positions` of settings that decide the length of rows."""
    return option(
        False,
        "Allow rows longer than the positions that the model was trained for, its max_position_embeddings.",
        flag="--past-positions",
    )


def usual_length(most: int, model: TwoTowerConfig) -> int:
    """The length of rows where none is asked for: `most`, or the model's positions where these are fewer."""
    return min(most, model.trained_positions or most)


def check_row_length(name: str, length: int, model: TwoTowerConfig, past_positions: bool) -> None:
    """Raises SettingError for a length, called `name`, beyond the positions that the model was trained for, unless
    `past_positions` allows it; and beyond a table of learnt positions, which nothing can follow."""
    positions = model.trained_positions
    if positions is not None and length > positions and not (past_positions and not model.num_positions):
        rule = f"at most {positions}, the positions that the model was trained for"
        asked = "" if model.num_positions else ", or set past_positions (--past-positions) to go beyond them"
        raise SettingError(name, length, rule, f"make shorter rows{asked}")
