"""docs/extend/encoder.md, followed word for word in a copy of the code: the new encoder trains, is
evaluated, and its exported model loads.
"""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extend" / "encoder.md"

TRAIN_EVALUATE_EXPORT = """
    import sys
    from dataclasses import replace
    from pathlib import Path

    import torch

    from pipeline.batches.features import fit_features
    from pipeline.batches.loader import TrainLoader
    from pipeline.batches.steps import step_plan
    from pipeline.evaluate import evaluator
    from pipeline.model.artifact import load_model, save_model
    from pipeline.train import loop
    from tests.worlds import tiny

    cfg = tiny.tiny_config(Path(sys.argv[1]))
    attention = replace(cfg.model.attention, window=None)
    model = replace(
        cfg.model, encoder="mean_pool", attention=attention, truncate_after_layer=None, channels={}
    )
    cfg = replace(cfg, model=model, train=replace(cfg.train, epochs=1))
    tiny.publish_sequences(cfg)
    maps = fit_features(cfg)
    loader = TrainLoader(cfg, maps, step_plan(cfg), rank=0, world_size=1)

    lines = []
    trained = loop.train(cfg, maps, loader, "digest", log=lambda step, values: lines.append(values))
    save_model(cfg.model_dir, trained, cfg, maps, {})
    loaded = load_model(cfg.model_dir)
    metrics = evaluator.evaluate_model(cfg, cfg.model_dir, ["val"])

    assert type(loaded.model.transducer).__name__ == "MeanPool"
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    print(f"loss={lines[-1]['train/loss']:.3f} ne={metrics['val/ne/is_click']:.3f}")
"""


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def insert(path: Path, before: str, text: str) -> None:
    """Put `text` before the first `before` of the file."""
    source = path.read_text()
    assert source.count(before) >= 1, f"{path} has no {before!r}"
    path.write_text(source.replace(before, text + before, 1))


@pytest.fixture
def changed_copy(tmp_path: Path) -> Path:
    """The library with the page's file, its entry and its name."""
    for folder in ("pipeline", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)

    encoder, its_import, entry, name = code_blocks()
    encoders = tmp_path / "pipeline" / "model" / "encoders"
    (encoders / "mean_pool.py").write_text(encoder)
    insert(encoders / "__init__.py", "from pipeline.model.encoders.sasrec", its_import)
    insert(encoders / "__init__.py", '    "din": DIN', entry)
    insert(tmp_path / "pipeline" / "config" / "model.py", '"din"', f"{name.strip()}, ")
    return tmp_path


def test_the_page_adds_an_encoder(changed_copy: Path) -> None:
    """To the copy alone: its encoder has a name that ours refuses."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAIN_EVALUATE_EXPORT), str(changed_copy / "runs")],
        cwd=changed_copy,
        env={"PYTHONPATH": str(changed_copy), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss=0\.\d+ ne=\d\.\d+", done.stdout)
