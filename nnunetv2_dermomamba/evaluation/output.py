"""Tables for the terminal, CSV and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_dermomamba import __version__
from nnunetv2_dermomamba.cost import Cost
from nnunetv2_dermomamba.evaluation.aggregate import AUTHORS, FEWEST, PER_IMAGE, POOLED, Figure
from nnunetv2_dermomamba.evaluation.evaluate import FAILED, MISSING, SCORED, Evaluation
from nnunetv2_dermomamba.files import write_file

__all__ = [
    "METRICS",
    "Metric",
    "as_dict",
    "format_table",
    "metric_rows",
    "paper_rows",
    "read_csv",
    "remarks",
    "write_csv",
    "write_json",
    "write_text",
]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its title, its factor (100 for per cent) and whether small is good."""

    title: str
    factor: float = 100
    unit: str = "%"
    small_is_good: bool = False

    def show(self, value: float | None) -> str:
        """The value as text, ``-`` where it is undefined."""
        if value is None or math.isnan(value):
            return "-"
        return f"{value * self.factor:.2f}"


METRICS = {
    "dice": Metric("DSC"),
    "iou": Metric("IoU"),
    "precision": Metric("Precision"),
    "recall": Metric("Recall"),
    "specificity": Metric("Specificity"),
    "thresholded_jaccard": Metric("Thresholded Jaccard"),
    "hd95": Metric("HD95", 1, "px", True),
    "assd": Metric("ASSD", 1, "px", True),
    "boundary_f1": Metric("Boundary F1"),
    "soft_dice": Metric("Soft DSC"),
    "authors_precision": Metric("Precision, logit 0.5"),
    "authors_recall": Metric("Recall, logit 0.5"),
}
PAPER = ["dice", "iou", "precision", "recall"]
KINDS = {
    PER_IMAGE: "mean of images",
    POOLED: "pooled over pixels",
    AUTHORS: "as the authors' code",
}


def format_table(evaluation: Evaluation, cost: Cost | None = None) -> str:
    """The evaluation as text: the paper's table, then every metric, then what was not scored."""
    blocks = []
    for label in evaluation.settings.classes:
        heading = f"Class {label}\n" if len(evaluation.settings.classes) > 1 else ""
        blocks.append(heading + _columns(paper_rows(evaluation, label, cost)))
        blocks.append(_columns(metric_rows(evaluation, label)))
    text = "\n\n".join([*blocks, "\n".join(remarks(evaluation))]) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # file names need not be Unicode


def paper_rows(evaluation: Evaluation, label: int, cost: Cost | None) -> list[list[str]]:
    """The paper's table for one class, its heading first; a row of intervals starts with a space."""
    size = {"Params (M)": f"{cost.parameters / 1e6:.2f}", "Ops (G)": f"{cost.operations / 1e9:.2f}"} if cost else {}
    rows = [["", *size, *(METRICS[metric].title for metric in PAPER)]]
    for kind, title in KINDS.items():
        if kind not in evaluation.figures[label]:
            continue
        figures = evaluation.figures[label][kind]
        rows.append([title, *size.values(), *(METRICS[m].show(figures[m].value) for m in PAPER)])
        if _have_intervals(figures[m] for m in PAPER):
            rows.append(["  95 % interval", *("" for _ in size), *(_interval(m, figures[m]) for m in PAPER)])
    return rows


def metric_rows(evaluation: Evaluation, label: int) -> list[list[str]]:
    """Every metric of one class, the heading first."""
    differences = evaluation.differences.get(label, {})
    figures = evaluation.figures[label][PER_IMAGE]
    intervals = ["95 % interval"] if _have_intervals(figures.values()) else []
    rows = [["Per image", "", "mean", *intervals, "sd", "median", "images", "undefined"]]
    if differences:
        rows[0] += ["other's mean", "p (Wilcoxon)"]
    for name, figure in figures.items():
        metric = METRICS[name]
        row = [metric.title, metric.unit, metric.show(figure.value), *(_interval(name, figure) for _ in intervals)]
        row += [metric.show(figure.sd), metric.show(figure.median), str(figure.n), str(figure.undefined)]
        if name in differences:
            row += [metric.show(differences[name].other), _show_p(differences[name].p)]
        rows.append(row)
    return rows


def _show_p(p: float) -> str:
    """A p-value as text."""
    if math.isnan(p):
        return "-"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _interval(name: str, figure: Figure) -> str:
    show = METRICS[name].show
    return "-" if math.isnan(figure.low) else f"{show(figure.low)} to {show(figure.high)}"


def _have_intervals(figures: Iterable[Figure]) -> bool:
    return any(not math.isnan(figure.low) for figure in figures)


def remarks(evaluation: Evaluation) -> list[str]:
    """What does not show in the figures: cases left out, empty masks, files left over."""
    pairing, frame = evaluation.pairing, evaluation.frame
    cases = frame.drop_duplicates("case")
    scored = int((cases["status"] == SCORED).sum())
    lines = [f"{scored} of {len(cases)} cases scored."]
    if 0 < scored < FEWEST:
        lines += [f"Fewer than {FEWEST} cases: there are no 95 % intervals."]
    missing = cases.loc[cases["status"] == MISSING, "case"].tolist()
    treatment = "scored as empty masks" if evaluation.settings.missing_as_empty else "not in the figures"
    lines += _list(f"Without prediction, {treatment}", missing)
    lines += [f"Failed, not in the figures: {m}" for m in cases.loc[cases["status"] == FAILED, "message"]]
    lines += _list("Incomplete", cases.loc[(cases["status"] == SCORED) & (cases["message"] != ""), "message"].tolist())
    lines += _list("Predictions without ground truth, not scored", list(pairing.extra))
    lines += _list("Files that are no masks, ignored", [str(path) for path in pairing.ignored])
    lines += _list("Photographs not shown", [drawing.note for drawing in evaluation.drawings.values() if drawing.note])
    for label, differences in evaluation.differences.items():
        common, of_class = (
            max(d.n for d in differences.values()),
            f", class {label}" if len(evaluation.differences) > 1 else "",
        )
        lines.append(
            f"Compared with {evaluation.other} over {common} common cases{of_class}; p is per metric, not corrected."
        )
    for label in evaluation.settings.classes:
        rows = evaluation.of(label)
        lines += _list("Empty prediction, empty ground truth", _where(rows, 0, 0))
        lines += _list("Empty prediction", _where(rows, 0, 1))
        lines += _list("Empty ground truth", _where(rows, 1, 0))
    return lines


def _where(rows: pd.DataFrame, predicted: int, true: int) -> list[str]:
    """Cases whose prediction and ground truth are empty (0) or not (1)."""
    found = ((rows["tp"] + rows["fp"] > 0) == predicted) & ((rows["tp"] + rows["fn"] > 0) == true)
    return rows.loc[found & ((predicted, true) != (1, 1)), "case"].tolist()


def _list(title: str, names: list[str], count: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return [f"{title} ({len(names)}): {', '.join(names[:count])}{more}"]


def _columns(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first left, the others right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_dict(evaluation: Evaluation, cost: Cost | None = None) -> dict[str, Any]:
    """Everything but the drawings, ready for JSON; undefined values are ``None``."""
    frame, pairing = evaluation.frame, evaluation.pairing
    result = {
        "version": __version__,
        "settings": asdict(evaluation.settings),
        "cost": {**asdict(cost), "operations": cost.operations} if cost else None,
        "figures": {
            label: {kind: {m: asdict(f) for m, f in figures.items()} for kind, figures in kinds.items()}
            for label, kinds in evaluation.figures.items()
        },
        "other": evaluation.other or None,
        "differences": {
            label: {metric: asdict(difference) for metric, difference in differences.items()}
            for label, differences in evaluation.differences.items()
        },
        "missing": pairing.missing,
        "failed": sorted(set(frame.loc[frame["status"] == FAILED, "case"])),
        "extra": {name: str(path) for name, path in pairing.extra.items()},
        "ignored": [str(path) for path in pairing.ignored],
        "cases": frame.astype(object).where(frame.notna(), None).to_dict("records"),
    }
    return _finite(result)


def _finite(value: Any) -> Any:
    """The value with NaN as ``None``, which JSON has."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(evaluation: Evaluation, path: Path, cost: Cost | None = None) -> None:
    """Write everything but the drawings."""
    write_text(path, json.dumps(as_dict(evaluation, cost), indent=1, allow_nan=False) + "\n")


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """Write one row per case and class, those that were not scored included."""
    write_text(path, evaluation.frame.to_csv(index=False, lineterminator="\n"))


def read_csv(path: Path) -> pd.DataFrame:
    """Read what :func:`write_csv` wrote.

    Raises:
        ValueError: The file is no such table.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not {"case", "label", "status", "tp", "dice"} <= set(frame.columns):
            raise ValueError("columns are missing")
        numbers = frame.columns.difference(["case", "status", "message"])
        # By way of Python's float, so that what was written comes back to the last bit.
        frame[numbers] = frame[numbers].replace("", "nan").astype(np.float64)
    except ValueError as error:  # pandas' own errors and UnicodeDecodeError are among them
        raise ValueError(f"{path} is no table written by `dermomamba evaluate --csv`: {error}") from error
    return frame


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8", "backslashreplace"))  # file names need not be Unicode
