"""Templates that checkpoints bring, and what they may not do."""

import json

import pytest

from twotower.checkpoints.chat_template import ChatTemplate, Turn

TURNS = [Turn("system", "be"), Turn("user", "hi")]


@pytest.mark.parametrize("template", [{}, {"chat_template": None}])
def test_without_a_template_there_is_none(tmp_path, template):
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    assert ChatTemplate.load(tmp_path) is None


def test_it_is_what_transformers_renders(tmp_path):
    source = (
        "{{ bos_token }}{%- for message in messages %}\n  {% if loop.index0 == 9 %}{% break %}{% endif %}"
        "<|{{ message['role'] }}|>{{ message.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ {'a': 'é<'} | tojson }}{% endif %}"
    )
    config = {"chat_template": source, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = ChatTemplate.load(tmp_path).render(TURNS)
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": t.role, "content": t.content} for t in TURNS]
    theirs = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ours == theirs[0][0]


def test_a_jinja_file_wins_and_named_templates_have_a_default(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(TURNS) == "d"
    (tmp_path / "chat_template.jinja").write_text("j{{ messages[1].content }}")
    assert ChatTemplate.load(tmp_path).render(TURNS) == "jhi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_error(source):
    with pytest.raises(ValueError, match="chat template refuses"):
        ChatTemplate(source, {}).render(TURNS)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("last", ["a = ", " a =", "a", "hi"])
def test_a_begun_message_is_continued_as_in_transformers(trim, last):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content" + trim + " }}</>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    turns = [*TURNS, Turn("assistant", last)]
    ours = ChatTemplate(source, {}).render(turns, continue_last=True)
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": t.role, "content": t.content} for t in turns]
    theirs = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=False, continue_final_message=True
    )
    assert ours == theirs[0][0]


def test_a_message_that_the_template_changes_cannot_be_continued():
    with pytest.raises(ValueError, match="changes the message 'yes'"):
        ChatTemplate("{{ messages[0].content | upper }}", {}).render([Turn("assistant", "yes")], continue_last=True)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="is broken"):
        ChatTemplate("{% for %}", {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        ChatTemplate.load(tmp_path)
