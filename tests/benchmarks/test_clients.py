"""The table of clients: what a script prints becomes its rows, and what stops it is one of them."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "clients.py"
SCRIPT = """
import sys
from calls import given, named, report, shown
def good(): return shown(" ".join(given()))
def none(): return shown(" ")
texts = ["", "at last"]
def by_chance(): return shown(texts.pop(0))
def bad_call(): raise ValueError("first\\nsecond")
print("a line of the client's own")
report(named(good, none, by_chance, bad_call))
"""


@pytest.fixture(scope="module")
def clients():
    spec = importlib.util.spec_from_file_location("clients", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_client_has_a_script(clients):
    scripts = {path.name for path in clients.SCRIPTS.glob("*.*") if path.name.startswith(("use_", "send_"))}
    assert {client.script for client in clients.CLIENTS} == scripts
    assert {client.name for client in clients.CLIENTS} >= {"bodies", "openai", "guidellm"}


def test_each_call_is_a_row(clients, tmp_path):
    command = [sys.executable, "-P", "-c", SCRIPT]
    assert list(clients.run(command, tmp_path, "http://a", "tiny")) == [
        ("good", "“http://a tiny”", True),
        ("none", "NoText: the answer has no text", False),
        ("by chance", "“at last”", True),
        ("bad call", "ValueError: first", False),
    ]


def test_a_script_that_stops_is_a_row(clients, tmp_path):
    command = [sys.executable, "-P", "-c", "raise SystemExit('no such package')"]
    assert list(clients.run(command, tmp_path, "u", "m")) == [("the script", "no such package", False)]


def test_nothing_of_this_checkout_reaches_a_client(clients, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"src{os.pathsep}.")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere")
    told = "import os; from calls import report\nseen = [k for k in os.environ if 'OPENAI' in k]\n"
    told += "report({'seen': lambda: str([*seen, os.environ['PYTHONPATH']])})"
    [(_, seen, _)] = clients.run([sys.executable, "-P", "-c", told], tmp_path, "u", "m")
    assert seen == str([str(clients.SCRIPTS)])
