"""The page in headless Chromium: write in all modes, watch, step back, replay."""

import re
from typing import get_args

import httpx
import pytest

from twotower.decoding.generate import generate
from twotower.decoding.modes import Mode
from twotower.decoding.params import SamplingParams
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

pytest.importorskip("selenium", reason="selenium drives the browser; pip install 'twotower[dev]'")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.slow

PIXELS = """
const pixel = (colour) => {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return `rgb(${canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)})`;
};
return [...document.querySelectorAll("#legend .token")].map((token) => {
  const style = getComputedStyle(token);
  return [pixel(style.color), pixel(style.backgroundColor)];
});
"""
ALL = list(get_args(Mode))
NEW = 21


@pytest.fixture
def page(browser, url):
    browser.get(f"{url}/watch")
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#modes input"))
    return browser


def wait(browser, condition):
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def put(browser, name, value):
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(str(value))


def choose(browser, modes):
    for box in browser.find_elements(By.CSS_SELECTOR, "#modes input"):
        if box.is_selected() != (box.get_attribute("value") in modes):
            box.click()


def status(browser):
    return browser.find_element(By.ID, "status").text


def panels(browser):
    return {p.find_element(By.TAG_NAME, "h2").text: p for p in browser.find_elements(By.CLASS_NAME, "panel")}


def text(panel):
    return panel.find_element(By.CLASS_NAME, "text").get_attribute("textContent")


def write(browser, modes):
    put(browser, "prompt", "ab")
    put(browser, "max_tokens", NEW)
    put(browser, "block_size", 8)
    choose(browser, modes)
    browser.find_element(By.ID, "run").click()
    wait(browser, lambda: status(browser).startswith(("Done", "Not")))
    assert status(browser).startswith("Done"), status(browser)
    return panels(browser)


def slide(browser, panel, value):
    slider = panel.find_element(By.TAG_NAME, "input")
    browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        slider,
        value,
    )
    return int(slider.get_attribute("max"))


def test_all_modes_write_side_by_side_what_the_library_writes(page, model):
    shown = write(page, ALL)
    assert list(shown) == ALL
    for mode, panel in shown.items():
        slide(page, panel, 10**6)
        params = SamplingParams(mode="ar" if mode == "auto" else mode, max_new_tokens=NEW, block_size=8)
        expected = generate(model, ["ab"], params)[0]
        if "\ufffd" not in expected.text:
            # bytes of a character, one token each, are dots
            assert text(panel) == "ab" + "".join(c if c.isascii() else "·" * len(c.encode()) for c in expected.text)
        speed = panel.find_element(By.CLASS_NAME, "speed").text
        assert f"{len(expected.token_ids)} tokens in" in speed
        if mode == "diffusion":
            assert f"{expected.stats.denoiser_calls} NFE" in speed
        colours = {s.value_of_css_property("background-color") for s in panel.find_elements(By.CLASS_NAME, "token")}
        assert len(colours) == len(set(expected.commit_steps))


def test_the_slider_goes_back_to_any_step(page, model):
    [panel] = write(page, ["diffusion"]).values()
    last = slide(page, panel, 0)
    assert text(panel) == "ab"
    whole = generate(model, ["ab"], SamplingParams(max_new_tokens=NEW, block_size=8))[0]
    assert last == whole.stats.denoiser_calls
    slide(page, panel, 1)
    cells = panel.find_elements(By.CSS_SELECTOR, ".block li")
    assert len(cells) == 8
    masked = panel.find_elements(By.CSS_SELECTOR, ".block li.masked")
    assert 0 < len(masked) < 8
    assert f"Step 1 of {last}, {len(masked)} of 8 places masked" in panel.text
    assert text(panel).count("▒▒") == len(masked)
    sure = [float(c.find_element(By.CLASS_NAME, "sure").text) for c in cells if c not in masked]
    known = [c for c, step in zip(whole.confidences[:8], whole.commit_steps[:8], strict=True) if step == 0]
    assert sure == pytest.approx(known, abs=0.006)
    # the arrow keys do the same
    slider = panel.find_element(By.TAG_NAME, "input")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext").startswith("Step 2 of")
    fixed = page.execute_script(
        "return [...arguments[0].querySelectorAll('.block li.token')].map((c) => c.style.getPropertyValue('--step'))",
        panel,
    )
    assert [int(step) for step in fixed] == [step for step in whole.commit_steps[:8] if step <= 1]
    slider.send_keys(Keys.END)
    assert f"Step {last} of {last}" in panel.text


def test_the_replay_runs_from_the_start_to_the_end(page):
    shown = write(page, ["ar", "diffusion"])
    whole = {mode: text(panel) for mode, panel in shown.items()}
    page.execute_script("document.getElementById('replay').click()")
    wait(page, lambda: text(shown["ar"]) != whole["ar"])
    wait(page, lambda: all(text(panel) == whole[mode] for mode, panel in shown.items()))


def test_stop_ends_the_texts_and_frees_the_engine(page, engine, wait_until):
    put(page, "max_tokens", 1900)
    choose(page, ["ar"])
    page.find_element(By.ID, "run").click()
    wait(page, lambda: page.find_elements(By.CLASS_NAME, "token"))
    page.find_element(By.ID, "stop").click()
    wait(page, lambda: status(page) == "Not finished: ar.")
    assert "stopped" in panels(page)["ar"].text
    wait_until(lambda: engine.stats().num_running == 0)


def test_a_refusal_is_shown(page):
    put(page, "max_tokens", 5000)
    page.find_element(By.ID, "run").click()
    wait(page, lambda: status(page).startswith("Not finished"))
    assert "context length is 2000 tokens" in next(iter(panels(page).values())).text


def test_everything_is_usable_by_keyboard_and_has_a_name(page):
    fields = page.find_elements(By.CSS_SELECTOR, "input, textarea, button")
    assert all(field.accessible_name for field in fields)
    put(page, "max_tokens", 4)
    page.find_element(By.ID, "prompt").click()
    for _ in range(40):
        page.switch_to.active_element.send_keys(Keys.TAB)
        if page.switch_to.active_element.get_attribute("id") == "run":
            break
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wait(page, lambda: status(page).startswith("Done"))
    assert page.find_element(By.ID, "status").get_attribute("aria-live") == "polite"


def test_light_and_dark_are_readable(page):
    def luminance(colour):
        values = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    backs = {}
    for theme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        backs[theme] = page.find_element(By.TAG_NAME, "html").value_of_css_property("background-color")
        # every colour of the legend, drawn to a pixel: computed colours are oklch
        pairs = page.execute_script(PIXELS)
        assert len(pairs) == 16
        for ink, paper in pairs:
            dark, bright = sorted((luminance(ink), luminance(paper)))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5
    assert luminance(backs["light"]) > 0.8 > 0.1 > luminance(backs["dark"])


def test_it_works_offline_without_a_complaint(page, url):
    page.get_log("browser")  # forgets what earlier tests left there
    write(page, ["ar"])
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(loaded) >= 5
    assert all(name.startswith(url) for name in loaded)
    assert page.get_log("browser") == []


def test_a_key_is_asked_for_and_sent(browser, engine, serve):
    with serve(make_app(engine, ServerConfig(model_names=("tiny",), api_keys=("secret",)))) as served:
        assert httpx.get(f"{served.url}/twotower/about").status_code == 401
        browser.get(f"{served.url}/watch")
        wait(browser, lambda: status(browser) == "This server wants an API key.")
        put(browser, "key", "secret\t")
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#modes input"))
        write(browser, ["ar"])
        browser.get("about:blank")
