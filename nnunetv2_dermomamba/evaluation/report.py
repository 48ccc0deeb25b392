"""The evaluation as one HTML page that needs no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nnunetv2_dermomamba import __version__
from nnunetv2_dermomamba.cost import Cost
from nnunetv2_dermomamba.evaluation.evaluate import Evaluation
from nnunetv2_dermomamba.evaluation.metrics import DEFINITIONS, NOTES
from nnunetv2_dermomamba.evaluation.output import METRICS, metric_rows, paper_rows, remarks, write_text

__all__ = ["thumbnail_pixels", "write_report"]

CAPTIONS = (
    "In the order of the paper's table; per cent",
    "Every metric, mean over images",
)


def thumbnail_pixels(cases: int) -> int:
    """Longer side of the embedded photographs that keeps the page below about 40 MB up to 2 000 cases."""
    return 1024 if cases <= 100 else 640 if cases <= 400 else 384


def write_report(
    evaluation: Evaluation, path: Path, predictions: Path, ground_truth: Path, cost: Cost | None = None
) -> None:
    """Write the page.

    Args:
        evaluation: With drawings, as ``evaluate(..., thumbnail=thumbnail_pixels)`` gives it.
        path: The page to write.
        predictions: Folder named in its heading.
        ground_truth: Folder named in its heading.
        cost: The network's size, for the paper's table.
    """
    templates = files(__package__) / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string((templates / "report.html.j2").read_text("utf-8")).render(
        title="Segmentation report",
        subtitle=f"{predictions} against {ground_truth}; dermomamba {__version__}",
        blocks=[_block(evaluation, label, cost) for label in evaluation.settings.classes],
        remarks=remarks(evaluation),
        definitions={METRICS[metric].title: DEFINITIONS[metric] for metric in evaluation.metrics},
        notes=NOTES,
        data=_data(evaluation),
        style=Markup((templates / "report.css").read_text("utf-8")),
        script=Markup((templates / "report.js").read_text("utf-8")),
    )
    write_text(path, page)


def _block(evaluation: Evaluation, label: int, cost: Cost | None) -> dict[str, Any]:
    tables = []
    for caption, (head, *rows) in zip(
        CAPTIONS, (paper_rows(evaluation, label, cost), metric_rows(evaluation, label)), strict=True
    ):
        shown = [{"cells": row, "minor": row[0].startswith(" ")} for row in rows]
        tables.append({"caption": caption, "head": head, "rows": shown})
    return {"label": label, "tables": tables}


def _data(evaluation: Evaluation) -> dict[str, Any]:
    """What the page's script reads."""
    metrics = [
        {"key": m, "title": METRICS[m].title, "unit": METRICS[m].unit, "smallIsGood": METRICS[m].small_is_good}
        for m in evaluation.metrics
    ]
    cases = []
    for name, rows in evaluation.frame.groupby("case", sort=False):
        drawing, first = evaluation.drawings[name], rows.iloc[0]
        cases.append(
            {
                "name": name,
                "status": first["status"],
                "message": first["message"],
                "note": drawing.note,
                "width": drawing.width,
                "height": drawing.height,
                "picture": drawing.picture,
                "contours": drawing.contours,
                "values": {
                    int(row["label"]): {m: _shown(row[m], METRICS[m].factor) for m in evaluation.metrics}
                    for _, row in rows.iterrows()
                },
            }
        )
    return {"metrics": metrics, "labels": list(evaluation.settings.classes), "cases": cases}


def _shown(value: float, factor: float) -> float | None:
    return None if np.isnan(value) else round(float(value) * factor, 4)
