"""Size of figures, and the time in which a browser opens them.

    python benchmarks/figures.py [--runs 5] [--out benchmarks/results/figures.md]

Every model is traced on the meta device, divided in two and drawn as HTML. Headless Chromium opens the file,
each time with a new profile. The page is open when two frames have been drawn after the event ``load``, by
the clock that starts with the navigation. Then all modules are opened, and two more frames drawn. What the
browser gets is a copy of the file, with a stopwatch and without the policy that would keep it out. Where
there is no browser, times are left out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.drawing import outline

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1600,1000",
    "--enable-logging=stderr", "--remote-debugging-port=0",
)  # fmt: skip
STOPWATCH = """<script>
addEventListener("load", () => {
  const times = [];
  const drawn = (then) => requestAnimationFrame(() => requestAnimationFrame(() => {
    times.push(performance.now());
    then();
  }));
  drawn(() => {
    times.push(performance.now());
    document.getElementById("open").click();
    drawn(() => (console.log(`opened ${times[0]} all ${times[2] - times[1]}.`)));
  });
});
</script></body>"""
TIMES = re.compile(r"opened ([\d.]+) all (\d+\.?\d*)\.")


def resnet152() -> tuple[nn.Module, Tensor]:
    """ResNet-152 of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[3, 8, 36, 3], num_labels=1000)
    return ResNetForImageClassification(config), torch.zeros(2, 3, 224, 224)


def bert_large() -> tuple[nn.Module, Tensor]:
    """BERT-large of transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    return BertForSequenceClassification(config), torch.zeros(2, 128, dtype=torch.long)


def gpt2() -> tuple[nn.Module, Tensor]:
    """GPT-2 of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False)), torch.zeros(2, 64, dtype=torch.long)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ResNet-152": resnet152,
    "BERT-large": bert_large,
    "GPT-2": gpt2,
}


def open_in_browser(browser: str, text: str) -> tuple[float, float]:
    """Seconds until the page is drawn, and until all modules of it are open.

    Raises:
        RuntimeError: The browser gives no times.
    """
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text, count=1)
    copy = copy.replace("</body>", STOPWATCH)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "figure.html"
        path.write_text(copy, encoding="utf-8")
        process = subprocess.Popen(
            [browser, *FLAGS, f"--user-data-dir={folder}/profile", path.as_uri()],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        watch = threading.Timer(60, process.kill)
        watch.start()
        try:
            assert process.stderr is not None
            found = next(filter(None, (TIMES.search(line) for line in process.stderr)), None)
        finally:
            watch.cancel()
            process.kill()
            process.communicate()
    if found is None:
        raise RuntimeError(f"{browser} gives no times for {len(text)} characters within a minute")
    return float(found[1]) / 1e3, float(found[2]) / 1e3


def row(name: str, browser: str | None, runs: int, folder: Path | None) -> str:
    """Size and times of one model's figure."""
    with torch.device("meta"):
        model, example = MODELS[name]()
    divided = gs.partition(gs.trace(model, (example,), outputs=["logits"]), k=2)
    with tempfile.TemporaryDirectory() as scratch:
        place = (folder or Path(scratch)) / f"{name.lower()}.html"
        place.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        gs.draw(divided, place)
        drawn = time.perf_counter() - start
        text = place.read_text(encoding="utf-8")
        still = place.with_suffix(".svg")
        gs.draw(divided, still)
        sizes = place.stat().st_size, still.stat().st_size
    cells = [
        name,
        str(len(list(outline(*divided.drawn()).root.boxes()))),
        f"{drawn:.2f} s",
        f"{sizes[0] / 1e6:.2f} MB",
        f"{sizes[1] / 1e6:.2f} MB",
    ]
    if browser is None:
        cells += ["no browser", "no browser"]
    else:
        times = [open_in_browser(browser, text) for _ in range(runs)]
        for column in zip(*times, strict=True):
            cells.append(f"{statistics.median(column):.2f} s ({min(column):.2f} to {max(column):.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print every row, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path, help="also keep the figures in this folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    version = "no browser: times are left out"
    if browser is None:
        print(f"none of {', '.join(BROWSERS)} is installed, so that no times are measured")
    else:
        version = subprocess.run([browser, "--version"], capture_output=True, text=True).stdout.strip()
        version = re.sub(r"^(\S+ [\d.]+).*", r"\1, headless", version)
    lines = [
        "# Figures",
        "",
        f"`python benchmarks/figures.py --runs {options.runs}`, {datetime.date.today()}, "
        f"{platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, {version}. "
        "K = 2; medians, and the range.",
        "",
        "| model | boxes | to draw | HTML | SVG | opened in the browser | all modules opened |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in MODELS:
        lines.append(row(name, browser, options.runs, options.figures))
        print(lines[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
