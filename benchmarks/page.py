"""How fast the page of `jaxgpt export --format html` writes, in headless Chromium.

python benchmarks/page.py [--config FILE] [--rounds N]
Prints one JSON line: tokens per second while the window fills and past the window (median, lowest and highest of the
rounds), and the size of the page. The weights are random: every token costs the same.
"""

import argparse
import json
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile

import jax
from playwright.sync_api import sync_playwright

from jaxgpt import init, load_config
from jaxgpt.interop import page
from jaxgpt.runs.loading import Run, model_of
from jaxgpt.text.corpus import SHAKESPEARE_ALPHABET
from jaxgpt.tokenizer import CharTokenizer

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMED = """async ([text, maxNewTokens]) => {
  const before = performance.now();
  await window.jaxgpt.complete(text, { maxNewTokens, temperature: 0.8 });
  return (performance.now() - before) / 1000;
}"""


def random_run(recipe: str, folder: pathlib.Path) -> Run:
    """A run of a recipe with the weights that training starts from."""
    flags = ["--config", recipe, "--run.dir", str(folder / "run")]
    config = load_config([*flags, f"--model.vocab_size={len(SHAKESPEARE_ALPHABET)}"])
    params = init.init_params(config.model, jax.random.key(0))
    tokenizer = CharTokenizer(SHAKESPEARE_ALPHABET)
    return Run(folder, config, tokenizer, model_of(config.model, params), 0, None)


def measure(tab, block_size: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round: [median, lowest, highest]."""
    fill, past = block_size - 1, 64
    seconds = {"in_window": [], "past_window": []}
    for _ in range(rounds + 2):
        filling = tab.evaluate(TIMED, ["\n", fill])
        seconds["in_window"].append(filling)
        seconds["past_window"].append(tab.evaluate(TIMED, ["\n", fill + past]) - filling)
    count = {"in_window": fill, "past_window": past}
    speeds = {name: [count[name] / each for each in times[2:]] for name, times in seconds.items()}  # 2 to warm up
    return {name: [round(f(each), 1) for f in (statistics.median, min, max)] for name, each in speeds.items()}


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = random_run(args.config, pathlib.Path(folder))
        file = pathlib.Path(folder) / "page.html"
        page.write(file, run)
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(file.as_uri())
        tab.locator("#go").click()  # it writes a first text by itself: stop that
        tab.locator("#go", has_text="Write").wait_for()
        record = {
            "recipe": args.config,
            "tokens_per_second": measure(tab, run.config.model.block_size, args.rounds),
            "rounds": args.rounds,
            "page_bytes": file.stat().st_size,
            "chromium": browser.version,
            "machine": platform.machine(),
            "command": " ".join(["python", *sys.argv]),
        }
        browser.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
