"""The chat at / in headless Chromium: answers, branches, what the browser keeps, and hostile messages."""

import json

import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

pytest.importorskip("selenium", reason="selenium drives the browser; pip install 'twotower[dev]'")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.slow

NEW = 20
FORGET = "localStorage.clear(); sessionStorage.clear()"


def wait(browser, condition):
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def open_page(browser, url, *, fresh=True, **values):
    """Opens the chat, forgetting what the browser kept, with these settings chosen."""
    browser.get(f"{url}/page/icon.svg")
    if fresh:
        browser.execute_script(FORGET)
        settings = {
            "mode": "ar",
            "other": "",
            "tokens": False,
            "values": {"temperature": 0, "max_tokens": NEW, **values},
        }
        browser.execute_script("localStorage.setItem('twotower.choices', arguments[0])", json.dumps(settings))
    browser.get(url)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#mode option"))
    return browser


@pytest.fixture
def page(browser, url):
    yield open_page(browser, url)
    browser.get("about:blank")


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def say(browser, text):
    find(browser, "#entry").send_keys(text, Keys.ENTER)
    settle(browser)


def settle(browser):
    wait(browser, lambda: not find(browser, "#send").get_attribute("disabled"))


def messages(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".message")


def bodies(browser):
    return [one.find_element(By.CSS_SELECTOR, ".body").get_attribute("textContent") for one in messages(browser)]


def press(root, words):
    next(one for one in root.find_elements(By.TAG_NAME, "button") if one.text == words).click()


def kept(browser):
    script = (
        "return Object.keys(localStorage).filter((k) => k.startsWith('twotower.chat.')).map((k) => localStorage[k])"
    )
    return [json.loads(text) for text in browser.execute_script(script)]


def answer(model, prompt, **settings):
    return generate(model, [prompt], SamplingParams(**{"mode": "ar", "max_new_tokens": NEW, **settings}))[0].text


def show_message(browser, url, content):
    """Opens a chat whose one answer has this content."""
    open_page(browser, url)
    nodes = [
        {"id": "1", "parent": "root", "role": "user", "content": content},
        {"id": "2", "parent": "1", "role": "assistant", "content": content, "tokens": [[content, 0.5]]},
    ]
    chat = {"id": "x", "title": "", "system": "", "changed": 1, "nodes": nodes, "chosen": {}}
    browser.execute_script("localStorage.setItem('twotower.chat.x', arguments[0])", json.dumps(chat))
    browser.refresh()
    wait(browser, lambda: len(messages(browser)) == 2)
    return messages(browser)[1].find_element(By.CSS_SELECTOR, ".body")


def test_a_chat_sends_all_that_was_said_and_is_there_after_a_reload(page, url, model):
    say(page, "é")
    say(page, "b")
    first = answer(model, "[user]éa")
    second = answer(model, f"[user]é[assistant]{first}[user]ba")
    contents = [node["content"] for [chat] in [kept(page)] for node in chat["nodes"]]
    assert contents == ["é", first, "b", second]
    shown = bodies(page)
    open_page(page, url, fresh=False)
    assert bodies(page) == shown
    speed = find(page, ".message.assistant .speed").text
    assert speed.startswith(f"ar: {NEW} tokens, ")
    assert "passes" in speed


def test_a_block_is_seen_while_it_fills_and_tokens_have_colours(page):
    Select(find(page, "#mode")).select_by_value("diffusion")
    page.execute_script(
        "window.most = 0; new MutationObserver(() => {"
        "window.most = Math.max(window.most, document.querySelectorAll('.token.mask').length)"
        "}).observe(document.body, {subtree: true, childList: true})"
    )
    say(page, "é")
    assert page.execute_script("return window.most") > 0
    assert not page.find_elements(By.CSS_SELECTOR, ".token")
    assert "NFE" in find(page, ".message.assistant .speed").text
    find(page, "#tokens").click()
    assert len(page.find_elements(By.CSS_SELECTOR, ".message.assistant .token")) == NEW


def test_edited_messages_and_new_answers_are_branches(page, model):
    say(page, "é")
    press(messages(page)[1], "Regenerate")
    settle(page)
    assert "2 of 2" in messages(page)[1].text
    press(messages(page)[0], "Edit")
    field = find(page, ".edit textarea")
    field.clear()
    field.send_keys("b", Keys.CONTROL, Keys.ENTER)
    settle(page)
    assert kept(page)[0]["nodes"][-1]["content"] == answer(model, "[user]ba")
    assert bodies(page)[0] == "b"
    press(messages(page)[0], "‹")
    assert bodies(page)[0] == "é"
    assert len(messages(page)) == 2
    press(messages(page)[0], "Delete")
    page.switch_to.alert.accept()
    wait(page, lambda: bodies(page)[0] == "b")
    assert kept(page)[0]["nodes"][0]["content"] == "b"


def test_two_modes_are_compared_and_one_goes_on(page, model):
    Select(find(page, "#other")).select_by_value("diffusion")
    say(page, "é")
    pair = page.find_elements(By.CSS_SELECTOR, ".pair .message")
    assert [one.find_element(By.CSS_SELECTOR, ".speed").text.split(":")[0] for one in pair] == ["ar", "diffusion"]
    press(pair[1], "Go on with this")
    Select(find(page, "#other")).select_by_value("")
    say(page, "b")
    chosen = answer(model, "[user]éa", mode="diffusion")
    assert kept(page)[0]["nodes"][-1]["content"] == answer(model, f"[user]é[assistant]{chosen}[user]ba")


def test_stop_keeps_what_came_and_frees_the_engine(browser, url, engine, wait_until):
    page = open_page(browser, url, max_tokens=1900)
    find(page, "#entry").send_keys("é", Keys.ENTER)
    wait(page, lambda: len(bodies(page)) == 2 and bodies(page)[1])
    find(page, "#stop").click()
    settle(page)
    wait_until(lambda: engine.stats().num_running == 0)
    assert "Stopped." in messages(page)[1].text
    assert kept(page)[0]["nodes"][1]["content"]


def test_a_reload_in_the_middle_keeps_what_came_and_says_so(browser, url):
    page = open_page(browser, url, max_tokens=1900)
    find(page, "#entry").send_keys("é", Keys.ENTER)
    wait(page, lambda: len(kept(page)[0]["nodes"]) == 2 and kept(page)[0]["nodes"][1]["content"])
    open_page(page, url, fresh=False)
    assert "page was left" in messages(page)[1].text
    assert bodies(page)[1].strip()
    page.execute_script("localStorage.removeItem('twotower.choices')")


def test_a_full_context_is_said_and_a_new_message_takes_the_unanswered_ones_place(browser, url, model):
    page = open_page(browser, url, max_tokens=1900)
    page.execute_script("document.getElementById('entry').value = 'b'.repeat(300)")
    say(page, "")
    assert "context length is 2000 tokens" in messages(page)[1].text
    assert "Nothing was dropped" in messages(page)[1].text
    find(page, "#open-settings").click()
    find(page, "#reset").click()
    find(page, "[data-setting=max_tokens]").send_keys("4")
    find(page, "[data-setting=temperature]").send_keys("0")
    press(find(page, "#settings"), "Done")
    say(page, "é")
    assert bodies(page)[0] == "é"
    assert (
        kept(page)[0]["nodes"][-1]["content"]
        == generate(model, ["[user]éa"], SamplingParams(mode="ar", max_new_tokens=4))[0].text
    )


@pytest.mark.parametrize(
    "content",
    [
        "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>",
        "[a](javascript:window.hit=1) [b](data:text/html,<script>window.hit=1</script>) <a href='javascript:1'>c</a>",
        "![x](http://127.0.0.1:9/x.png) ![y](javascript:window.hit=1)",
        "```html\n<script>window.hit = 1</script>\n```\n`<b>`",
        "| a |\n|---|\n| <img src=x onerror=window.hit=1> |",
    ],
)
def test_hostile_messages_are_text(browser, url, content):
    for shows_tokens in (False, True):
        body = show_message(browser, url, content)
        if shows_tokens:
            find(browser, "#tokens").click()
        assert browser.execute_script("return window.hit") is None
        assert not body.find_elements(By.CSS_SELECTOR, "script, img, iframe, [onerror]")
        assert all(link.get_attribute("href").startswith("http:") for link in body.find_elements(By.TAG_NAME, "a"))
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(url) for name in loaded)


def test_markdown_is_drawn(browser, url):
    text = (
        "# Head\n\nA **bold** *soft* `x < y` word, see [here](https://example.org/a_b).\n\n- one\n- two\n  1. inner\n\n"
        "> quoted\n\n```py\nx = '<b>'\n\ny\n```\n\n| a | b |\n|:--|---|\n| 1 | 2 |\n\n---\nsnake_case_name"
    )
    body = show_message(browser, url, text)
    for selector, words in {
        "h3": "Head",
        "strong": "bold",
        "em": "soft",
        "p code": "x < y",
        "a[rel~=noopener]": "here",
        "ul > li": "one",
        "ul ol li": "inner",
        "blockquote p": "quoted",
        ".code pre code": "x = '<b>'\n\ny",
        ".code-head span": "py",
        "td": "1",
        "th": "a",
        "hr + p": "snake_case_name",
    }.items():
        assert body.find_element(By.CSS_SELECTOR, selector).text == words, selector
    assert body.find_elements(By.TAG_NAME, "hr")


def test_conversations_are_searched_renamed_deleted_exported_and_imported(page, tmp_path):
    say(page, "é")
    find(page, "#new").click()
    say(page, "b")
    names = lambda: [one.text for one in page.find_elements(By.CSS_SELECTOR, "#chats .open")]  # noqa: E731
    assert names() == ["b", "é"]
    press(find(page, "#chats li.shown"), "Rename")
    page.switch_to.active_element.send_keys("Mine", Keys.ENTER)
    wait(page, lambda: names() == ["Mine", "é"])
    find(page, "#search").send_keys("é")
    wait(page, lambda: "é" in names())
    find(page, "#search").clear()
    find(page, "#search").send_keys("mine", Keys.ENTER)
    wait(page, lambda: names() == ["Mine"])
    exported = page.execute_async_script(
        "const done = arguments[0]; import('./page/conversation.js').then(async (tree) => {"
        "const store = await import('./page/store.js'); done(tree.exported(store.allChats())) })"
    )
    assert [m["role"] for m in json.loads(exported)["conversations"][0]["messages"]] == ["user", "assistant"]
    press(find(page, "#chats li"), "Delete")
    page.switch_to.alert.accept()
    wait(page, lambda: names() == [])
    find(page, "#search").send_keys(Keys.BACKSPACE * 4)
    wait(page, lambda: names() == ["é"])
    file = tmp_path / "chats.json"
    file.write_text(exported)
    find(page, "#file").send_keys(str(file))
    wait(page, lambda: sorted(names()) == ["Mine", "é", "é"])
    file.write_text('{"a": 1}')
    find(page, "#file").send_keys(str(file))
    wait(page, lambda: "no list of messages" in find(page, "#status").text)


def test_a_model_without_a_template_is_said_once_and_answers_in_the_plain_form(browser, engine, model, serve):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), max_context=2000))) as served:
        page = open_page(browser, served.url)
        assert "no chat template" in find(page, "#banner").text
        say(page, "é")
        assert kept(page)[0]["nodes"][1]["content"] == answer(model, "User: é\n\nAssistant:")
        browser.get("about:blank")


def test_a_key_is_asked_for_and_outlives_a_reload(browser, engine, serve):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), api_keys=("secret",)))) as served:
        browser.get(f"{served.url}/page/icon.svg")
        browser.execute_script(FORGET)
        browser.get(served.url)
        wait(browser, lambda: find(browser, "#settings").get_attribute("open"))
        assert "wants an API key" in find(browser, "#status").text
        browser.switch_to.active_element.send_keys("secret", Keys.TAB)
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#mode option"))
        browser.refresh()
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#mode option"))
        browser.get("about:blank")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_and_complains_of_nothing(browser, url, theme):
    scheme = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 760, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.get_log("browser")
        page = open_page(browser, url)
        say(page, "x" * 120)
        for opened in (None, "#open-side", "#open-settings"):
            if opened:
                find(page, opened).click()
            assert page.execute_script("return document.documentElement.scrollWidth") <= 380
            fields = page.find_elements(By.CSS_SELECTOR, "input, textarea, button, select")
            # the dialog makes all else inert
            assert all(f.accessible_name for f in fields if f.is_displayed() and opened != "#open-settings")
            inside = find(page, "#settings").find_elements(By.CSS_SELECTOR, "input, textarea, button, select")
            assert all(f.accessible_name for f in inside if opened == "#open-settings")
            if opened == "#open-side":
                assert find(page, "#chats .open").is_displayed()
                find(page, "#close-side").click()
        assert page.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
