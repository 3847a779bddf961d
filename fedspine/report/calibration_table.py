"""What `fedspine calibrate` shows on stdout: a row per device, and how well rounds were predicted."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedspine.calibration import Calibration, Prediction
from fedspine.report.console import size

MOST_ROWS = 40
WIDTH = 120


def print_calibration(result: Calibration) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_table(result))
    if len(result.types) > MOST_ROWS:
        console.print(f"... and {len(result.types) - MOST_ROWS} more rows: --json and --out have all of them")
    console.print(in_words(result))


def in_words(result: Calibration) -> str:
    """Of the prediction and of what is not known."""
    words = [f"{len(result.fits)} of {result.config.devices} devices trained"]
    if len(result.fits) < result.config.devices:
        words[0] += ", the others get the medians"
    if result.median_error is None:
        words.append("no device trained twice, so nothing could be predicted")
    else:
        words.append(
            f"a round predicted from the device's rounds before: median error {result.median_error:.1%} of the "
            f"{result.config.cost} time, over {len(result.predictions)} rounds"
        )
    return "; ".join(words) + "."


def _table(result: Calibration) -> Table:
    table = Table(title=f"devices of {escape(str(result.run))}", title_justify="left")
    for name in ("", "rounds", "GFLOP/s", "Mbit/s down, up", "memory", "predicted", "measured", "median error"):
        table.add_column(name, justify="right" if name else "left")
    by_device: dict[str, list[Prediction]] = {}
    for each in result.predictions:
        by_device.setdefault(f"device {each.device}", []).append(each)
    for kind, note in list(zip(result.types, result.notes, strict=True))[:MOST_ROWS]:
        own = by_device.get(kind.name, [])
        name = f"{kind.name} and {kind.count - 1} more" if kind.count > 1 else kind.name
        table.add_row(
            name,
            note.removeprefix("rounds: ") if note.startswith("rounds") else "0",
            f"{kind.gflops:.3g}{_fixed(kind.iteration_ms)} ± {kind.jitter:.0%}",
            f"{kind.download_mbps:.3g}, {kind.upload_mbps:.3g}{_fixed(kind.latency_ms)} ± {kind.bandwidth_sigma:.0%}",
            size(1e6 * kind.memory_mb),
            f"{median(each.predicted_seconds for each in own):.3g} s" if own else "",
            f"{median(each.measured_seconds for each in own):.3g} s" if own else "",
            f"{median(each.error for each in own):.1%}" if own else "",
        )
    return table


def _fixed(milliseconds: float | None) -> str:
    """What an iteration, or a transfer, costs beside its rate."""
    return f" + {milliseconds:.3g} ms" if milliseconds else ""
