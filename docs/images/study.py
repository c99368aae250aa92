"""The picture of docs/guide/scaling.md, from the figures of the smallest study.

python docs/images/study.py
"""

import json
from pathlib import Path

from pipeline.evaluate.page_parts import png_bytes
from pipeline.study.page import draw_laws

HERE = Path(__file__).parent
RUN = HERE.parents[1] / "benchmarks" / "runs" / "study_smallest.json"

if __name__ == "__main__":
    figures = json.loads(RUN.read_text())["figures"]
    (HERE / "study_laws.png").write_bytes(png_bytes(draw_laws(figures)))
