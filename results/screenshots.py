"""Pictures of the page of iris_play.py for the README. Needs chromium, chromedriver and tests/requirements.txt.

    python results/screenshots.py --checkpoint results/models/breakout.pt

play_page.png is the dream at 1280x800, with its policy, value and reward. play.webp shows game and dream side by side
(`--compare`), and hand.webp the dream under keys that are held on the page, both at half that size.
"""
import io
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image
from selenium import webdriver

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    """Takes pictures of the page of iris_play.py."""

    checkpoint: str = "results/models/breakout.pt"  # Checkpoint to play with
    out: Path = ROOT / "results"  # Folder of the pictures
    seconds: float = 9.0  # Length of play.webp and hand.webp
    fps: int = 8  # Its pictures a second
    scheme: str = "dark"  # light or dark


def open_page(browser: webdriver.Chrome, args: Args, *flags: str) -> subprocess.Popen:
    """Starts iris_play.py on a free port and opens its page."""
    command = [sys.executable, "-u", str(ROOT / "iris_play.py"), "--checkpoint", args.checkpoint, "--port", "0", *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "BROWSER")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if found := re.search(r"Open (http\S+) in", line):
            browser.get(found[1])
            return process
    raise SystemExit("iris_play.py did not start")


def wait_for(browser: webdriver.Chrome, condition: str, seconds: float = 120.0) -> None:
    """Until a JavaScript expression on `latest`, the page's newest message, is true, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not browser.execute_script(f"return latest && {condition}"):
        time.sleep(0.05)


def picture(browser: webdriver.Chrome) -> Image.Image:
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def film(browser: webdriver.Chrome, args: Args, name: str, keys: list[str]) -> None:
    """What the page shows for some seconds, in which these keys are held one after the other."""
    began, pictures = time.monotonic(), []
    while (now := time.monotonic() - began) < args.seconds:
        for i, key in enumerate(keys):
            browser.execute_script(f"hold('{key}', {str(i == int(now / args.seconds * len(keys))).lower()})")
        pictures.append(picture(browser).resize((800, 500), Image.Resampling.LANCZOS))
        time.sleep(max(0.0, began + len(pictures) / args.fps - time.monotonic()))
    first, *others = pictures
    more = {"append_images": others, "duration": round(1000 * args.seconds / len(pictures)), "loop": 0}
    first.save(args.out / name, save_all=True, quality=70, method=4, **more)


def main(args: Args) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    processes = []
    try:
        size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": args.scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        processes.append(open_page(browser, args, "--world-model", "--agent"))
        wait_for(browser, "latest.traces[0]?.length == 100 && latest.step > 12")
        picture(browser).save(args.out / "play_page.png", optimize=True)

        processes[-1].terminate()

        processes.append(open_page(browser, args, "--compare"))
        wait_for(browser, "latest.drift[0] > 3", 30)
        film(browser, args, "play.webp", [])
        processes[-1].terminate()

        processes.append(open_page(browser, args, "--world-model", "--fps", "10"))
        wait_for(browser, "latest.step >= 0", 30)
        film(browser, args, "hand.webp", ["space", "left", "right"] * 3)
    finally:
        browser.quit()
        for process in processes:
            process.terminate()
            process.wait()
    for name in ("play_page.png", "play.webp", "hand.webp"):
        print(f"{args.out / name}: {(args.out / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args))
