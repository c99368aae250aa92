"""Pictures of MLflow's pages as people see them: docs/images/mlflow_*.png.

    python -m tests.support.mlflow_pages --runs-dir runs        # needs chromium, and runs to show

The runs are those of `--runs-dir`, its newest two with a model. Debian's package `chromium` is
enough: nothing is downloaded.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from pipeline import tracking
from pipeline.config import RunConfig
from pipeline.tracking.columns import TRAINING_PAGES

IMAGES = Path(__file__).parents[2] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (2000, 850)
PAGE_SHARE = 0.743  # of the width: right of it is a panel that opens by itself in a new browser
COLOURS = 64  # of a picture: pages are flat, and a picture stays below 150 kB
PAGE_MS = 240_000  # of the page's own clock, which stands still while it waits for the server


def page_urls(client: MlflowClient, server: str, cfg: RunConfig, list_url: str) -> dict[str, str]:
    """Address of each page by the name of its picture.

    Raises:
        ValueError: there are fewer than two finished runs, or no registered model.
    """
    experiment = client.get_experiment_by_name(cfg.tracking.experiment)
    if experiment is None:
        raise ValueError(f"no experiment {cfg.tracking.experiment!r}: train something first")
    number = experiment.experiment_id
    finished = "attributes.status = 'FINISHED' and params.`model.encoder` != ''"
    runs = [run.info.run_id for run in client.search_runs([number], finished)]
    versions = client.search_model_versions(max_results=1)
    if len(runs) < 2 or not versions:
        raise ValueError(f"{len(runs)} finished runs, {len(versions)} versions: two and one needed")

    compared = f"runs={json.dumps(runs[:2])}&experiments={json.dumps([number])}"
    compared = compared.replace(" ", "").replace('"', "%22")
    model = versions[0]
    trained = f"{server}/#/experiments/{number}/runs"
    return {
        "list": list_url,
        "run": f"{trained}/{model.run_id}?{TRAINING_PAGES}",
        "system": f"{trained}/{runs[0]}/system-metrics?{TRAINING_PAGES}",
        "compare": f"{server}/#/compare-runs?{compared}&{TRAINING_PAGES}",
        "model": f"{server}/#/models/{model.name}/versions/{model.version}?{TRAINING_PAGES}",
    }


def take_picture(browser: str, url: str, path: Path) -> None:
    """Write what a browser shows at `url` as a PNG of few colours."""
    width, height = SIZE
    command = [
        browser,
        "--headless",
        "--no-sandbox",  # root in a container, and only pages of our own server
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
        f"--virtual-time-budget={PAGE_MS}",
        f"--screenshot={path}",
        url,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)

    with Image.open(path) as picture:
        page = picture.convert("RGB").crop((0, 0, int(PAGE_SHARE * width), height))
        few = page.quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def take_pictures(pages: Mapping[str, str], folder: Path) -> None:
    """A picture of each page, `mlflow_<name>.png`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)}: apt-get install chromium")

    for name, url in pages.items():
        path = folder / f"mlflow_{name}.png"
        take_picture(browser, url, path)
        print(f"{path.stat().st_size / 1000:5.0f} kB  {path}  {url}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--pages", nargs="*", help="names of some pages; all without it")
    options = parser.parse_args()

    cfg = replace(RunConfig(), runs_dir=options.runs_dir)
    with tracking.session(cfg) as tracker:
        server = tracker.server_url
        pages = page_urls(MlflowClient(server), server, cfg, tracker.list_url)
        chosen = {name: pages[name] for name in options.pages or pages}
        options.out.mkdir(parents=True, exist_ok=True)
        take_pictures(chosen, options.out)


if __name__ == "__main__":
    main()
