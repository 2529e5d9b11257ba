"""The recorded command runs the same again."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from twotower.origin import command


@pytest.mark.parametrize(
    ("module", "argv", "expected"),
    [
        (None, ["/usr/bin/twotower", "eval"], "twotower eval"),
        (None, ["benchmarks/ablations.py", "a b"], "python benchmarks/ablations.py 'a b'"),
        (None, ["-c", "a"], "python -c a"),
        ("twotower.__main__", ["/src/twotower/__main__.py", "eval"], "python -m twotower eval"),
        ("twotower.eval.lm_eval", ["/src/twotower/eval/lm_eval.py"], "python -m twotower.eval.lm_eval"),
    ],
)
def test_the_command_can_be_pasted(monkeypatch, module, argv, expected):
    main = types.ModuleType("__main__")
    main.__spec__ = None if module is None else ModuleSpec(module, None)  # as python and python -m set it
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    assert command() == expected
