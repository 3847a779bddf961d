"""The report of a study: a pure function of its file and its finished cells, as Markdown, JSON and one HTML page."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine import __version__
from fedspine.errors import CheckpointError
from fedspine.report.comparison_tables import Table
from fedspine.report.records import write_atomically
from fedspine.study.cell_figures import CellFigures, figures
from fedspine.study.design import Level, Point, Study, load_study
from fedspine.study.estimate import CellPlan
from fedspine.study.evidence import Contrast, Evidence
from fedspine.study.guidelines import NOT_TESTED, Verdict, verdicts
from fedspine.study.metrics import METRICS
from fedspine.study.robustness import Robustness, robust
from fedspine.study.run import check_same, default_directory, plan_study, results
from fedspine.study.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("report.md", "report.json", "report.html")
_STYLE = "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}" \
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}img{max-width:100%}"  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a study has found."""

    study: Study
    planned: int
    finished: int
    infeasible: tuple[CellPlan, ...]
    effects: dict[str, list[tuple[Level, Contrast]]]
    """By varied factor: the mean at each level."""
    differences: dict[str, list[Contrast]]
    """By varied factor: of each level to the first, where all else is equal."""
    by_learner: dict[str, list[tuple[Level, Level, Contrast]]]
    """By other factor: the mean at (level, learner)."""
    verdicts: tuple[Verdict, ...]
    cells: tuple[CellFigures, ...]
    robustness: tuple[Robustness, ...]


def report_study(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of what is finished. Returns the directory.

    Errors: subclasses of `FedSpineError`, also when no cell is finished.
    """
    study = load_study(path)
    directory = Path(out) if out is not None else default_directory(study)
    check_same(directory, study)
    report = make_report(study, plan_study(study), list(results(directory)))
    figure = draw_effects(report)
    pages = (as_markdown(report), json.dumps(as_json(report), indent=1) + "\n", as_html(report, figure))
    for name, text in zip(FILES, pages, strict=True):
        write_atomically(directory / name, text.encode())
    return directory


def make_report(study: Study, plans: Sequence[CellPlan], found: Sequence[dict[str, Any]]) -> Report:
    """Errors: `CheckpointError` when no cell of the study is finished."""
    wanted = {plan.cell.name for plan in plans}
    evidence = Evidence(study, [result for result in found if result["name"] in wanted])
    if not evidence.points:
        raise CheckpointError("no cell of this study is finished yet: `fedspine study run` comes first")
    varied = [factor for factor in study.vary if len(evidence.levels(factor)) > 1]
    effects, differences, by_learner = {}, {}, {}
    for factor in varied:
        levels = evidence.levels(factor)
        means = [(level, evidence.mean(**{factor: level})) for level in levels]
        effects[factor] = [(level, mean) for level, mean in means if mean]
        if factor != "task":  # tasks have no rows in common
            rest = [evidence.difference(factor, level, levels[0]) for level in levels[1:]]
            differences[factor] = [contrast for contrast in rest if contrast]
        if factor != "learner" and "learner" in varied:
            cells = [(at, who) for at in levels for who in evidence.levels("learner")]
            both = [(at, who, evidence.mean(**{factor: at, "learner": who})) for at, who in cells]
            by_learner[factor] = [(at, who, mean) for at, who, mean in both if mean]
    return Report(
        study=study,
        planned=sum(not plan.estimate.infeasible for plan in plans),
        finished=len(wanted & {result["name"] for result in found}),
        infeasible=tuple(plan for plan in plans if plan.estimate.infeasible and plan.cell.seed == 0),
        effects=effects,
        differences=differences,
        by_learner=by_learner,
        verdicts=tuple(verdicts(evidence)),
        cells=tuple(figures(study, evidence)),
        robustness=tuple(robust(evidence)),
    )


def as_markdown(report: Report) -> str:
    lines = [f"# Study {report.study.name}", "", _summary(report)]
    for table in _tables(report):
        lines += ["", *table.markdown()]
    return "\n".join([*lines, "", "## Not tested", "", *_not_tested()]) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Every figure of the report."""
    return {
        "fedspine": __version__,
        "study": asdict(report.study),
        "planned": report.planned,
        "finished": report.finished,
        "infeasible": [{"levels": dict(p.cell.levels), "reason": p.estimate.infeasible} for p in report.infeasible],
        "effects": {
            factor: [{"level": level, **asdict(mean)} for level, mean in means]
            for factor, means in report.effects.items()
        },
        "differences": {factor: [asdict(each) for each in rows] for factor, rows in report.differences.items()},
        "guidelines": [
            {
                "name": each.guideline.name,
                "text": each.guideline.text,
                "source": each.guideline.source,
                "verdict": each.verdict,
                "why": each.why,
                "claims": [
                    {**asdict(claim.contrast), "expected": claim.expected, "p_corrected": p, "verdict": verdict}
                    for claim, p, verdict in each.claims
                ],
            }
            for each in report.verdicts
        ],
        "not_tested": NOT_TESTED,
        "cells": [asdict(each) for each in report.cells],
        "robustness": [asdict(each) for each in report.robustness],
    }


def as_html(report: Report, figure: Figure) -> str:
    """One page that needs nothing else."""
    parts = [f"<h1>Study {html.escape(report.study.name)}</h1>", f"<p>{html.escape(_summary(report))}</p>"]
    parts.append(f'<img alt="effects" src="data:image/png;base64,{_png(figure)}">')
    for table in _tables(report):
        rows = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in table.rows]
        head = "".join(f"<th>{html.escape(text)}</th>" for text in table.header)
        body = "".join(f"<tr>{row}</tr>" for row in (head, *rows))
        parts += [f"<h2>{html.escape(table.title)}</h2>", f"<table>{body}</table>"]
    parts += ["<h2>Not tested</h2><ul>", *(f"<li>{html.escape(line[2:])}</li>" for line in _not_tested()), "</ul>"]
    title = html.escape(report.study.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )


def draw_effects(report: Report) -> Figure:
    """A panel per varied factor: means with intervals, a line per learner where that varies too."""
    from fedspine.report.comparison_figures import new_figure
    from fedspine.report.curves import COLOURS

    factors = list(report.effects) or [""]
    figure = new_figure(4.0 * min(3, len(factors)), 3.2 * -(-len(factors) // 3))
    axes = figure.subplots(-(-len(factors) // 3), min(3, len(factors)), squeeze=False).flat
    for axis, factor in zip(axes, factors, strict=False):
        levels = [level for level, _ in report.effects.get(factor, [])]
        lines: dict[str, list[tuple[Level, Contrast]]] = {"": report.effects.get(factor, [])}
        if factor in report.by_learner:
            rows = report.by_learner[factor]
            lines = {str(who): [(at, mean) for at, w, mean in rows if w == who] for who in dict(r[1::-1] for r in rows)}
        for colour, (label, means) in zip(COLOURS, lines.items(), strict=False):
            at = [levels.index(level) for level, _ in means]
            middle = [mean.interval.mean for _, mean in means]
            arms = [[max(0.0, mean.interval.mean - mean.interval.low) for _, mean in means]]
            arms.append([max(0.0, mean.interval.high - mean.interval.mean) for _, mean in means])
            axis.errorbar(at, middle, yerr=arms, fmt="o-", ms=4, capsize=3, lw=1, color=colour, label=label or None)
        axis.set_xticks(range(len(levels)), [str(level) for level in levels], fontsize=8)
        axis.set(title=factor, ylabel=_metric(report.study))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in list(axes)[len(factors) :]:
        axis.set_visible(False)
    return figure


def _tables(report: Report) -> list[Table]:
    found = [_verdict_table(report.verdicts), _claim_table(report.verdicts)]
    for factor, means in report.effects.items():
        rows = tuple((str(level), *_interval(mean.interval), str(len(mean.cells))) for level, mean in means)
        found.append(Table(f"{factor}: {_metric(report.study)}", (factor, "mean", "95 % interval", "cells"), rows))
    differences = [each for rows in report.differences.values() for each in rows]
    rows = tuple((each.text, *_interval(each.interval, "+.3f"), str(len(each.cells))) for each in differences)
    found.append(Table("Differences, all else equal", ("levels", "mean", "95 % interval", "cells"), rows))
    found.append(_cell_table(report))
    if report.robustness:
        found.append(_robustness_table(report))
    if report.infeasible:
        reasons = tuple((_levels(plan), plan.estimate.infeasible) for plan in report.infeasible)
        found.append(Table("Infeasible, not run", ("cell", "why"), reasons))
    return found


def _robustness_table(report: Report) -> Table:
    factors = _seen_factors(report)
    rows = tuple(
        (
            *(_level(each.levels, factor) for factor in factors),
            *(_percent(change) for change in (each.value, each.seconds, each.bytes, each.value_in_time)),
            *each.cells,
        )
        for each in report.robustness
    )
    header = (*factors, "value", "s", "MB sent", "value in the twin's time", "cell", "twin")
    return Table("Robustness: change against the clean twin, 95 % intervals", header, rows)


def _percent(change: Interval | None) -> str:
    if change is None:
        return "-"
    return f"{100 * change.mean:+.0f} % ({100 * change.low:+.0f} to {100 * change.high:+.0f})"


def _seen_factors(report: Report) -> list[str]:
    """Varied ones that some finished cell looks at."""
    return [factor for factor in report.study.vary if any(cell.levels[factor] is not None for cell in report.cells)]


def _level(levels: Point, factor: str) -> str:
    return "-" if levels[factor] is None else str(levels[factor])


def _cell_table(report: Report) -> Table:
    factors = _seen_factors(report)
    target, perplexity = report.study.target, ["perplexity"] if report.study.metric == "perplexity" else []
    rows = tuple(
        (
            *(_level(cell.levels, factor) for factor in factors),
            *(f"{cell.value:.3f}", *([f"{math.exp(-cell.value):.2f}"] if perplexity else [])),
            *(f"{cell.seconds:.1f}", f"{cell.traffic_bytes / 1e6:.1f}"),
            f"{cell.memory_bytes / 1e6:.0f}",
            *("-" if value is None else f"{value:.3f}" for value in cell.within.values()),
            "-" if cell.slower is None else f"{100 * cell.slower:+.0f} %",
            *([f"{cell.seconds_to_target:.1f} ({cell.reached} reached it)"] if target else []),
            cell.name,
        )
        for cell in report.cells
    )
    limits = [f"within {limit}" for limit in report.cells[0].within]
    goal = [f"s to {target:g}"] if target else []
    header = (*factors, "value", *perplexity, "s", "MB sent", "MB memory", *limits, "half as fast", *goal, "cell")
    return Table("Cells: value, and a device's cost", header, rows)


def _verdict_table(found: Sequence[Verdict]) -> Table:
    rows = tuple((v.guideline.name, v.guideline.text, v.guideline.source, v.verdict, v.why) for v in found)
    return Table("Guidelines", ("", "guideline", "source", "verdict", ""), rows)


def _claim_table(found: Sequence[Verdict]) -> Table:
    rows = tuple(
        (
            *(verdict.guideline.name, claim.contrast.text, claim.expected),
            *_interval(claim.contrast.interval, "+.3f"),
            *(f"{p:.3f}", str(claim.contrast.interval.seeds), str(claim.contrast.interval.rows), own),
            " ".join(claim.contrast.cells[:8]) + (" ..." if len(claim.contrast.cells) > 8 else ""),
        )
        for verdict in found
        for claim, p, own in verdict.claims
    )
    header = ("", "contrast", "claim", "mean", "95 % interval", "p, corrected", "seeds", "rows", "verdict", "cells")
    return Table("Claims behind the verdicts", header, rows)


def _interval(interval: Interval, digits: str = ".3f") -> tuple[str, str]:
    return f"{interval.mean:{digits}}", f"{interval.low:{digits}} to {interval.high:{digits}}"


def _summary(report: Report) -> str:
    study = report.study
    unfinished = "" if report.finished == report.planned else " Verdicts may change with the rest."
    return (
        f"{report.finished} of {report.planned} cells finished, seeds 0 to {study.seeds - 1}, {study.users} users with "
        f"{study.test_examples} held-out rows each, device {study.device}. Metric: {_metric(study)}. Intervals: paired "
        f"bootstrap over seeds, users and rows, 95 %.{unfinished}"
    )


def _metric(study: Study) -> str:
    return METRICS[study.metric].says


def _levels(plan: CellPlan) -> str:
    return ", ".join(f"{factor} {level}" for factor, level in plan.cell.levels.items() if level is not None)


def _not_tested() -> list[str]:
    return [f"- {name}: {reason}." for name, reason in NOT_TESTED.items()]


def _png(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
