"""Takes the pictures of the server's pages in headless Chromium, docs/page-*.png and docs/chat-*.png.

python docs/make_screenshots.py URL  # of `twotower serve`
"""

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

DESK, PHONE = (1120, 800), (380, 760)
SAID = ("Tell a story of a boy with a red kite.", "And what did his dog do?")
CHOICES = {"mode": "diffusion", "other": "", "tokens": True, "values": {"confidence_threshold": 0.5, "max_tokens": 60}}
# Half way through each text; the steps of a block are best seen where some of its places are masked.
SHOW = """
document.querySelectorAll(".panel input").forEach((slider) => {
  slider.value = Math.round(slider.max * 0.45);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
});
"""
# Each event of an answer comes 80 ms after the one before, so that a block in progress is met.
SLOWLY = r"""
const send = window.fetch;
window.fetch = async (...given) => {
  const answer = await send(...given);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  const body = new ReadableStream({ async pull(to) {
    for (;;) {
      const cut = rest.indexOf("\n\n") + 2;
      if (cut >= 2) {
        await new Promise((done) => setTimeout(done, 80));
        to.enqueue(new TextEncoder().encode(rest.slice(0, cut)));
        rest = rest.slice(cut);
        return;
      }
      const { done, value } = await reader.read();
      if (done) return to.close();
      rest += decoder.decode(value, { stream: true });
    }
  } });
  return new Response(body, answer);
};
"""


def browser(theme: str, size: tuple[int, int]) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(argument)
    options.add_argument(f"--blink-settings=preferredColorScheme={int(theme == 'light')}")
    options.binary_location = shutil.which("chromium") or ""
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    # A window is never narrower than 500 pixels.
    shape = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    started.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    return started


def take(page: webdriver.Chrome, name: str) -> None:
    """A picture of what the window shows, with as many colours as it needs to look the same."""
    picture = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB").quantize(128)
    picture.save(Path(__file__).parent / f"{name}.png", optimize=True)


def watch(url: str, theme: str) -> None:
    """The page that watches modes."""
    with browser(theme, (1120, 1330)) as page:
        page.get(f"{url}/watch")
        WebDriverWait(page, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#modes input"))
        page.find_element(By.ID, "run").click()
        WebDriverWait(page, 120).until(lambda b: b.find_element(By.ID, "status").text.startswith("Done"))
        page.execute_script(SHOW)
        take(page, f"page-{theme}")


def chat(url: str, name: str, theme: str, size: tuple[int, int]) -> None:
    """The chat, in the middle of a block of its second answer."""
    with browser(theme, size) as page:
        page.get(f"{url}/page/icon.svg")  # localStorage is a site's
        page.execute_script("localStorage.setItem('twotower.choices', arguments[0])", json.dumps(CHOICES))
        page.get(url)
        WebDriverWait(page, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#mode option"))
        entry = page.find_element(By.ID, "entry")
        entry.send_keys(SAID[0], Keys.ENTER)
        WebDriverWait(page, 60).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".message")) == 2)
        WebDriverWait(page, 60).until(lambda b: b.find_element(By.ID, "send").is_enabled())
        page.execute_script(SLOWLY)
        entry.send_keys(SAID[1], Keys.ENTER)
        WebDriverWait(page, 60, 0.02).until(in_the_middle)
        take(page, name)


def in_the_middle(page: webdriver.Chrome) -> bool:
    """Whether an answer has a text and a block that is half done."""
    masks = len(page.find_elements(By.CSS_SELECTOR, ".mask"))
    answers = page.find_elements(By.CSS_SELECTOR, ".message .body")
    return 4 <= masks <= 10 and len(answers) == 4 and len(answers[-1].text) > 120


def main(url: str) -> None:
    for theme in ("light", "dark"):
        watch(url, theme)
        chat(url, f"chat-{theme}", theme, DESK)
    chat(url, "chat-phone", "dark", PHONE)


main(sys.argv[1])
