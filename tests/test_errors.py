"""twotower.errors."""

import pickle

from twotower.errors import SettingError


def test_a_setting_error_tells_name_value_rule_and_fix() -> None:
    error = SettingError("block_size", 0, "an integer in [1, 16]", "leave it out")
    assert str(error) == "block_size is 0, must be an integer in [1, 16]; leave it out"
    assert error.told("blockSize").startswith("blockSize is 0, must be")
    assert str(SettingError("mode", "fast", "one of ar, auto")) == "mode is 'fast', must be one of ar, auto"


def test_a_setting_error_crosses_processes_with_its_fields() -> None:
    error = pickle.loads(pickle.dumps(SettingError("seed", -1, "at least 0", "drop it")))
    assert (error.name, error.value, error.rule, error.fix) == ("seed", -1, "at least 0", "drop it")
