"""Takes docs/page-light.png and docs/page-dark.png in headless Chromium: python docs/make_screenshots.py URL."""

import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

# Half way through each text; the steps of a block are best seen where some of its places are masked.
SHOW = """
document.querySelectorAll(".panel input").forEach((slider) => {
  slider.value = Math.round(slider.max * 0.45);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
});
"""


def main(url: str) -> None:
    for theme, code in {"light": 1, "dark": 0}.items():
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--window-size=1120,1330"):
            options.add_argument(argument)
        options.add_argument(f"--blink-settings=preferredColorScheme={code}")
        options.binary_location = shutil.which("chromium") or ""
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            browser.get(f"{url}/watch")
            WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#modes input"))
            browser.find_element(By.ID, "run").click()
            WebDriverWait(browser, 120).until(lambda b: b.find_element(By.ID, "status").text.startswith("Done"))
            browser.execute_script(SHOW)
            browser.save_screenshot(str(Path(__file__).parent / f"page-{theme}.png"))


main(sys.argv[1])
