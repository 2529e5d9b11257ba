"""The format that a template teaches."""

import pytest

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.server.tools.choice import tool_format
from twotower.server.tools.hermes import Hermes
from twotower.server.tools.json_list import JsonList
from twotower.server.tools.llama3 import Llama3
from twotower.server.tools.mistral import Mistral
from twotower.server.tools.xml import FunctionXml


@pytest.mark.parametrize(
    ("written", "format"),
    [
        ('<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>', Hermes),
        ("<tool_call>\\n<function=example_function_name>\\n<parameter=x>", FunctionXml),
        ("'[TOOL_CALLS]' + name + '[ARGS]'", Mistral),
        ('[TOOL_CALLS] [{"name": "x"}]', Mistral),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', Llama3),
        ("<|python_tag|>", Llama3),
        ("<TOOLCALL>", JsonList),
        ("<|tool_call|>", JsonList),
        ("", JsonList),
    ],
)
def test_a_template_teaches_its_format(written, format):
    template = ChatTemplate("{% if tools %}{% raw %}" + written + "{% endraw %}{% endif %}", {})
    assert isinstance(tool_format("auto", template), format)
    assert isinstance(tool_format("hermes", template), Hermes)


def test_a_model_without_tools_is_told_of_hermes():
    assert isinstance(tool_format("auto", ChatTemplate("{{ messages }}", {})), Hermes)
    assert isinstance(tool_format("auto", None), Hermes)


def test_a_name_is_enough():
    formats = [("llama3_json", Llama3), ("mistral", Mistral), ("qwen3_coder", FunctionXml), ("json", JsonList)]
    assert all(isinstance(tool_format(name, None), format) for name, format in formats)


@pytest.mark.parametrize(
    ("name", "written", "forced"),
    [
        ("mistral", "[TOOL_CALLS]", 'calls: "[TOOL_CALLS]" " "? "["'),
        ("mistral", "[TOOL_CALLS] [ARGS]", 'call: "[TOOL_CALLS]" ("f" "[ARGS]" arguments0)'),
        ("json", "<TOOLCALL>", 'calls: "<TOOLCALL>" "["'),
        ("json", "tools", 'calls: "["'),
    ],
)
def test_forced_calls_have_the_form_of_the_template(name, written, forced):
    format = tool_format(name, ChatTemplate("{% raw %}" + written + "{% endraw %}", {}))
    assert forced in format.grammar({"f": {}}, lambda mark: f'"{mark}"', many=False)
