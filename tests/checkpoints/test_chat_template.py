"""Templates that checkpoints bring, and what they may not do."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from twotower.checkpoints.chat_template import ChatTemplate, Turn

TURNS = [Turn("system", "be"), Turn("user", "hi")]
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TURNS]


@pytest.mark.parametrize("template", [{}, {"chat_template": None}])
def test_without_a_template_there_is_none(tmp_path, template):
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    assert ChatTemplate.load(tmp_path) is None


@pytest.fixture
def agrees(tmp_path, byte_tokenizer):
    """Asserts that a folder renders messages as transformers' own tokenizer of that folder does; the files are given by
    name, JSON as objects."""

    def check(files, messages=MESSAGES, *, continued=False, **given):
        byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **given,
        )
        more = [{key: v for key, v in m.items() if key not in ("role", "content")} for m in messages]
        turns = [Turn(m["role"], m.get("content"), rest) for m, rest in zip(messages, more, strict=True)]
        assert ChatTemplate.load(tmp_path).render(turns, continued, **given) == theirs
        return theirs

    return check


def test_it_is_what_transformers_renders(agrees):
    source = (
        "{{ bos_token }}{%- for message in messages %}\n  {% if loop.index0 == 9 %}{% break %}{% endif %}"
        "<|{{ message['role'] }}|>{{ message.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ {'b': 'é<', 'a': 1} | tojson }}"
        "{{ {'b': ['é'], 'a': 1} | tojson(indent=2, ensure_ascii=true, sort_keys=true, separators=(',', ' : ')) }}"
        "{{ strftime_now('%Y-%m') }}{{ documents is none }}{{ tools }}{% endif %}"
    )
    config = {"chat_template": source, "bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True}
    assert agrees({"tokenizer_config.json": config}).startswith("<s><|system|>be\n<|user|>hi\n")


def test_the_mark_of_what_the_model_writes_changes_nothing(agrees):
    source = (
        "{% set n = 1 %}{%- for m in messages %}\n<{{ m.role }}>{% generation -%} {% set n = 2 %}{{ m.content }}|\n"
        "  {%- endgeneration %}{{ n }}{% endfor %}"
    )
    assert agrees({"chat_template.jinja": source}) == "<system>be|1<user>hi|1"


def test_tools_documents_and_further_keys_of_messages_reach_the_template(agrees):
    source = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for d in documents or [] %}{{ d.title }}{% endfor %}"
        "{% for m in messages %}{{ m.name }}|{{ m.content is defined }}|{{ m.tool_calls | default([]) | length }}|"
        "{{ m.reasoning_content }}{{ m.thinking }}\n{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "get", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "get", "description": "<é>"}}]
    rendered = agrees({"chat_template.jinja": source}, messages, tools=tools, documents=[{"title": "t", "text": "b"}])
    assert rendered.endswith("Ann|True|0|\n|False|1|whywhy\n|True|0|\n")


NAMED = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("files", "rendered", "with_tools"),
    [
        ({"tokenizer_config.json": {"chat_template": "c"}}, "c", "c"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "d", "t"),
        ({"tokenizer_config.json": {"chat_template": NAMED}, "chat_template.jinja": "j"}, "j", "j"),
        ({"chat_template.jinja": "j", "additional_chat_templates/tool_use.jinja": "a"}, "j", "a"),
        ({"chat_template.jinja": "j", "additional_chat_templates/rag.jinja": "a"}, "j", "j"),
    ],
)
def test_where_templates_are_kept_and_which_is_taken(agrees, files, rendered, with_tools):
    assert agrees(files) == rendered
    assert agrees(files, tools=[{"type": "function"}]) == with_tools


def test_a_processors_template_is_read_where_the_tokenizer_has_none(tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "p"}))
    assert ChatTemplate.load(tmp_path).render(TURNS) == "p"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "c"}))
    assert ChatTemplate.load(tmp_path).render(TURNS) == "c"


def test_without_a_default_among_named_templates_there_is_a_sentence(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": "r"}]}))
    with pytest.raises(ValueError, match=r"templates are \['rag'\], and none is 'default'"):
        ChatTemplate.load(tmp_path).render(TURNS)


TOKENS = "{{ bos_token }},{{ eos_token }},{{ image_token }}"
ALL_ADDED = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}


@pytest.mark.parametrize(
    ("config", "mapped", "rendered"),
    [
        ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}, "<s>,</s>,"),
        ({"bos_token": "<mask>"}, {"bos_token": "<s>"}, "<s>,,"),
        ({"bos_token": "<s>", "eos_token": None, "image_token": "<mask>"}, {}, "<s>,,<mask>"),
        ({"bos_token": "<s>", "added_tokens_decoder": ALL_ADDED}, {"bos_token": "<mask>"}, "<s>,,"),
    ],
)
def test_special_tokens_are_named_as_in_transformers(agrees, config, mapped, rendered):
    files = {"chat_template.jinja": TOKENS, "tokenizer_config.json": config}
    assert agrees(files | ({"special_tokens_map.json": mapped} if mapped else {})) == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{{ 'a'.index('b') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_error(source):
    with pytest.raises(ValueError, match="chat template refuses"):
        ChatTemplate(source, {}).render(TURNS)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("last", ["a = ", " a =", "a", "hi"])
def test_a_begun_message_is_continued_as_in_transformers(agrees, trim, last):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content" + trim + " }}</>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    agrees({"chat_template.jinja": source}, [*MESSAGES, {"role": "assistant", "content": last}], continued=True)


def test_a_message_that_the_template_changes_cannot_be_continued():
    with pytest.raises(ValueError, match="changes the message 'yes'"):
        ChatTemplate("{{ messages[0].content | upper }}", {}).render([Turn("assistant", "yes")], continue_last=True)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="is broken"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(ValueError, match="template 'rag' is broken"):
        ChatTemplate({"rag": "{% for %}"}, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        ChatTemplate.load(tmp_path)
