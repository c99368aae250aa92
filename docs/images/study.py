"""The pictures of studies in docs/guide/scaling.md, from benchmarks/runs/study_*.json.

python docs/images/study.py
"""

import json
from pathlib import Path

from pipeline.evaluate.page_parts import png_bytes
from pipeline.study.page import draw_fronts, draw_laws

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "benchmarks" / "runs"

# picture: the study it is of, and what it shows
PICTURES = {
    "study_laws": ("smallest", draw_laws),
    "study_drifting_fronts": ("drifting", draw_fronts),
    "study_drifting_laws": ("drifting", draw_laws),
    "study_chains_fronts": ("chains", draw_fronts),
    "study_ml_1m_fronts": ("ml_1m", draw_fronts),
}

if __name__ == "__main__":
    for picture, (study, draw) in PICTURES.items():
        run = json.loads((RUNS / f"study_{study}.json").read_text())
        (HERE / f"{picture}.png").write_bytes(png_bytes(draw(run["figures"])))
