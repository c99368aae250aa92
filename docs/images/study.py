"""The pictures of studies in docs/guide/scaling.md, from benchmarks/runs/study_*.json.

python docs/images/study.py
"""

import json
from pathlib import Path

from pipeline.evaluate.page_parts import png_bytes
from pipeline.study.page import draw_fronts, draw_laws, draw_slopes

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "benchmarks" / "runs"

if __name__ == "__main__":
    for run in sorted(RUNS.glob("study_*.json")):
        figures = json.loads(run.read_text())["figures"]
        if run.stem == "study_smallest":
            (HERE / "study_laws.png").write_bytes(png_bytes(draw_laws(figures)))
            continue
        pictures = {"slopes": draw_slopes, "fronts": draw_fronts}
        if figures["laws"]:
            pictures["laws"] = draw_laws
        for name, draw in pictures.items():
            (HERE / f"{run.stem}_{name}.png").write_bytes(png_bytes(draw(figures)))
