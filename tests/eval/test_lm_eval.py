"""The adapter under lm_eval itself: the scores of `twotower eval`, and log-likelihoods by the context tower."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers import processors

from twotower.checkpoints import save
from twotower.decoding.params import SamplingParams
from twotower.eval import lm_eval as adapter
from twotower.eval.answering import answer, mean_score
from twotower.eval.lm_eval import TwoTowerLM
from twotower.eval.tasks import FILLER, read_task

RECIPE = Path(__file__).parents[2] / "recipes" / "lm_eval" / "twotower_lists.yaml"
MODES = ("ar", "diffusion", "verified")
SAMPLING = {"temperature": 1.0, "block_size": 8}


def total_under(model, before, after):
    """The sum of the log-probabilities of some tokens under the context tower, from the logits of one pass."""
    logits = model.context_logits([[*before, *after]])[0, len(before) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(after).unsqueeze(-1)).sum().item()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save(model, path)
    return path


@pytest.fixture(scope="module")
def adapted(checkpoint):
    return TwoTowerLM(pretrained=str(checkpoint), batch_size=3)


@pytest.fixture(scope="module")
def task_file(model, asking, tmp_path_factory):
    """Ten questions, to which ar has six answers right, diffusion two and verified one; the last is nobody's."""
    asked = asking("exact")
    said = {
        mode: [a.text for a in answer(model, asked, SamplingParams(mode=mode, seed=0, **SAMPLING))] for mode in MODES
    }
    answers = [*said["ar"][:6], *said["diffusion"][6:8], said["verified"][8], "no"]
    lines = [
        {"prompt": e.prompt, "answer": a, "scorer": "exact", "max_new_tokens": e.max_new_tokens, "stop": ["#"]}
        for e, a in zip(asked.examples, answers, strict=True)
    ]
    path = tmp_path_factory.mktemp("task") / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def local_tasks(task_file):
    """The committed task for lm_eval, but with our questions."""
    text = RECIPE.read_text().replace("src/twotower/data/tasks/lists.jsonl", str(task_file))
    text = text.replace('until: ["\\n"]', 'until: ["#"]\n  do_sample: true\n  temperature: 1.0')
    text = text.replace("max_gen_toks: 32", "max_gen_toks: 12")
    # elsewhere than in the user's cache
    text = text.replace("dataset_kwargs:", f"dataset_kwargs:\n  cache_dir: {task_file.parent / 'cache'}")
    (task_file.parent / "twotower_lists.yaml").write_text(text)
    return TaskManager(include_path=str(task_file.parent), include_defaults=False)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "right"), [("ar", 6), ("diffusion", 2), ("verified", 1)])
def test_lm_eval_gives_the_score_of_twotower_eval(model, checkpoint, task_file, local_tasks, mode, right, monkeypatch):
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: None)
    adapter.main()
    found = simple_evaluate(
        model="twotower",
        model_args={"pretrained": str(checkpoint), "mode": mode, "block_size": 8},
        tasks=["twotower_lists"],
        task_manager=local_tasks,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    ours = mean_score(answer(model, read_task(str(task_file)), SamplingParams(mode=mode, seed=0, **SAMPLING)))
    assert found["results"]["twotower_lists"]["score,none"] == ours == right / 10


def test_a_line_of_a_file_whose_other_lines_say_more_is_scored():
    line = {"prompt": "a", "answer": "b", "scorer": "exact", "max_new_tokens": 1, "stop": ["#"]}
    assert adapter.process_results(line | {"group": None, "distance": None}, ["b"]) == {"score": 1.0}


@pytest.mark.parametrize("more", [{"prompt": f"a {FILLER}", "distance": 5}, {"prompt": "a", "scorer": "likelihood"}])
def test_a_line_that_lm_eval_cannot_ask_or_judge_is_refused(more):
    with pytest.raises(ValueError, match=r"measure it with twotower eval"):
        adapter.process_results({"answer": "b", "scorer": "exact", "max_new_tokens": 1} | more, ["b"])


def test_the_committed_task_asks_as_the_task_file_does():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    recipe = yaml.load(RECIPE.read_text(), Loader)
    examples = read_task("lists").examples
    assert {example.stop for example in examples} == {tuple(recipe["generation_kwargs"]["until"])}
    assert {example.max_new_tokens for example in examples} == {recipe["generation_kwargs"]["max_gen_toks"]}
    assert recipe["process_results"] == f"{adapter.__name__}.process_results"
    assert (RECIPE.parents[2] / recipe["dataset_kwargs"]["data_files"]["test"]).exists()


@pytest.mark.filterwarnings("ignore:'twotower.eval.lm_eval' found in sys.modules")
def test_run_as_a_module_it_is_found_by_lm_eval(monkeypatch):
    seen = []
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: seen.append(get_model("twotower")))
    runpy.run_module("twotower.eval.lm_eval", run_name="__main__")
    assert seen == [TwoTowerLM]


def test_log_likelihoods_are_the_context_towers(model, adapted):
    pairs = [("ab", "cd"), ("a longer context", "!"), ("", "xyz"), ("q", " and more")]
    found = adapted.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    for (context, new), (total, is_greedy) in zip(pairs, found, strict=True):
        before = model.tokenizer.encode(context).ids or [model.config.bos_token_id]
        after = model.tokenizer.encode(new).ids
        assert total == pytest.approx(total_under(model, before, after), abs=1e-3)
        best = model.context_logits([[*before, *after]])[0, len(before) - 1 : -1].argmax(-1)
        assert is_greedy == (best.tolist() == after)


def test_the_likeliest_continuation_is_greedy(model, adapted):
    prompt = model.tokenizer.encode("ab").ids
    token = model.prefill([prompt]).next_logits.argmax().item()
    [(_, greedy), (_, other)] = adapted._score([(prompt, [token]), (prompt, [token ^ 1])])
    assert (greedy, other) == (True, False)


def test_a_whole_text_is_read_in_windows(model, adapted, monkeypatch):
    text = SimpleNamespace(args=("0123456789",))
    ids = [model.config.bos_token_id, *model.tokenizer.encode(text.args[0]).ids]
    [whole] = adapted.loglikelihood_rolling([text])
    assert whole == pytest.approx(total_under(model, ids[:1], ids[1:]), abs=1e-3)
    monkeypatch.setattr(TwoTowerLM, "max_length", 4)
    [windows] = adapted.loglikelihood_rolling([text])
    # each token once, after at most 4 others: 1-4 after the prefix, 5-8 and 9-10 after as many as there is room for
    parts = [(ids[:1], ids[1:5]), (ids[4:5], ids[5:9]), (ids[6:9], ids[9:11])]
    expected = sum(total_under(model, before, after) for before, after in parts)
    assert windows == pytest.approx(expected, abs=1e-3)


def test_a_context_that_is_too_long_loses_its_start(model, adapted, monkeypatch):
    ids = model.tokenizer.encode("0123456789").ids
    monkeypatch.setattr(TwoTowerLM, "max_length", 4)
    [(total, _)] = adapted._score([(ids[:8], ids[8:])])
    assert total == pytest.approx(total_under(model, ids[5:8], ids[8:]), abs=1e-3)


def test_a_generation_that_is_too_long_loses_the_start_of_its_context(adapted, monkeypatch):
    def asked(context, length):
        return adapted.generate_until([SimpleNamespace(args=(context, {"max_gen_toks": length}))])

    long, end = "abcdefghijklmnop", "klmnop"
    monkeypatch.setattr(TwoTowerLM, "max_length", None)
    alone, whole = asked(end, 4), asked(long, 4)
    assert alone != whole
    monkeypatch.setattr(TwoTowerLM, "max_length", 10)
    assert asked(long, 4) == alone
    with pytest.raises(ValueError, match="max_gen_toks is 10, must be below 10"):
        asked(long, 10)


def test_a_continuation_that_is_too_long_is_scored_in_windows(model, adapted, monkeypatch):
    ids = model.tokenizer.encode("0123456789abc").ids
    monkeypatch.setattr(TwoTowerLM, "max_length", 4)
    requests = [(("a", "b"), ids[:2], ids[2:]), (("c", "d"), ids[:8], ids[8:]), (("e", ""), ids[:1], [])]
    [(total, is_greedy), other, nothing] = adapted._loglikelihood_tokens(requests)
    # each token once, after at most 4 others
    parts = [(ids[1:2], ids[2:6]), (ids[5:6], ids[6:10]), (ids[8:10], ids[10:])]
    assert total == pytest.approx(sum(total_under(model, *part) for part in parts), abs=1e-3)
    greedy = [adapted._score([part])[0].is_greedy for part in parts]
    assert is_greedy == all(greedy)
    second = [(ids[7:8], ids[8:12]), (ids[8:12], ids[12:])]
    assert other[0] == pytest.approx(sum(adapted._score([part])[0].log_probability for part in second), abs=1e-3)
    assert nothing == (0, True)


def test_what_a_task_asks_of_a_generation_reaches_the_decoder(adapted):
    asked = {"until": "\n", "max_gen_toks": 5, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    params = adapted._params(asked, 7)
    assert (params.stop, params.max_new_tokens, params.seed) == (("\n",), 5, 7)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 3, 0.9)
    assert adapted._params(asked | {"do_sample": False}, 0).temperature == 0.0
    assert adapted._params({}, 0).max_new_tokens == 256
    with pytest.raises(ValueError, match=r"\{'num_beams': 4\}"):
        adapted._params({"num_beams": 4, "repetition_penalty": 1.0}, 0)


def test_what_other_models_need_to_be_told_for_the_default_is_taken_as_that(adapted):
    asked = {"num_beams": 1, "top_k": 0, "top_p": None, "repetition_penalty": 1.0, "use_cache": True, "until": None}
    assert adapted._params(asked, 3) == adapted._params({}, 3)
    assert adapted._params({"top_k": -1}, 3) == adapted._params({}, 3)
    assert adapted._params({"do_sample": False, "top_p": 0.0}, 3) == adapted._params({"temperature": 0.0}, 3)
    assert adapted._params({"max_new_tokens": 7}, 0).max_new_tokens == 7


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """A checkpoint with a template that trims messages, as many do."""
    path = tmp_path / "owner" / "chatting"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return path


@pytest.mark.slow
def test_lm_evals_chats_are_written_by_the_checkpoints_template(chatting, local_tasks, monkeypatch):
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: None)
    adapter.main()
    found = simple_evaluate(
        model="twotower",
        model_args={"pretrained": str(chatting), "block_size": 8},
        tasks=["twotower_lists"],
        task_manager=local_tasks,
        device="cpu",
        bootstrap_iters=0,
        limit=2,
        apply_chat_template=True,
        system_instruction="be",
    )
    prompts = [sample["arguments"][0][0] for sample in found["samples"]["twotower_lists"]]
    assert prompts == ["<system>be<user>ab<assistant>", "<system>be<user>the cat<assistant>"]


def test_a_begun_answer_is_continued(chatting):
    chat = TwoTowerLM(pretrained=str(chatting))
    history = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": " 2 + 2 = "}]
    assert chat.apply_chat_template(history, add_generation_prompt=False) == "<user>2 + 2<assistant>2 + 2 ="
    assert chat.apply_chat_template(history[:1]) == "<user>2 + 2<assistant>"
    assert chat.tokenizer_name == str(chatting).replace("/", "__")
    assert chat.chat_template(True) == (chatting / "chat_template.jinja").read_text()
    assert chat.chat_template(False) is None
    with pytest.raises(ValueError, match="'tools'"):
        chat.chat_template("tools")


def test_without_a_template_there_are_no_chats(adapted):
    with pytest.raises(ValueError, match="has no chat template; drop --apply_chat_template"):
        adapted.apply_chat_template([{"role": "user", "content": "a"}])


def test_a_text_that_begins_with_the_first_token_gets_no_second_one(model, checkpoint):
    adapted = TwoTowerLM(pretrained=str(checkpoint))
    first = model.config.bos_token_id
    name = adapted.encoder.id_to_token(first)
    template = [(name, first)]
    adapted.encoder.post_processor = processors.TemplateProcessing(f"{name} $A", special_tokens=template)
    assert adapted.tok_encode("a")[0] == first
    assert adapted.tok_encode(f"{name}a") == adapted.tok_encode("a")
    assert adapted.tok_encode(f"{name}a", add_special_tokens=True)[:2] == [first, first]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"speed": 2}, "'speed'"),
        ({"stop": "a"}, "'stop'"),
        ({"dtype": "int8"}, "'int8'"),
        ({"batch_size": "auto"}, "'auto'"),
        ({"mode": "fast"}, "'fast'"),
    ],
)
def test_bad_model_arguments_are_named(checkpoint, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        TwoTowerLM(pretrained=str(checkpoint), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_lm_evals_default_device_is_said_to_be_ignored(checkpoint):
    with pytest.warns(UserWarning, match="running on cpu"):
        assert TwoTowerLM(pretrained=str(checkpoint), device="cuda:0").model.context_device.type == "cpu"
