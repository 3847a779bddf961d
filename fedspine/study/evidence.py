"""Finished cells, put against each other: contrasts of levels where all other factors are equal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

from fedspine.study.design import Cell, Level, Point, Study, budget, canonical
from fedspine.study.run import Result
from fedspine.study.statistics import Interval, bootstrap, join, weighted


@dataclass(frozen=True)
class Contrast:
    """A difference of means, and what it was taken from."""

    text: str
    interval: Interval
    cells: tuple[str, ...]
    """Names of cells, without their seeds."""
    levels: tuple[Level, Level] | None = None
    """Of a plain difference: what is compared with what."""


class Evidence:
    """What a study has found so far."""

    def __init__(self, study: Study, results: Iterable[Result]) -> None:
        self.study = study
        self.of_cell: dict[str, dict[int, Result]] = defaultdict(dict)
        for result in results:
            name, _, seed = result["name"].rpartition("-seed")
            self.of_cell[name][int(seed)] = result
        self._scores = {
            cell: {seed: result["scores"] for seed, result in seeds.items()} for cell, seeds in self.of_cell.items()
        }
        self.points = [point for point in study.points() if cell_of(point) in self.of_cell]

    def levels(self, factor: str) -> list[Level]:
        """That are finished somewhere, the smallest first where they are amounts; else in the order of the file."""
        found = list(dict.fromkeys(each for point in self.points if (each := canonical(point)[factor]) is not None))
        if factor == "budget":
            return sorted(found, key=lambda level: (budget(level)[1], budget(level)[0]))
        return sorted(found) if all(isinstance(each, (int, float)) for each in found) else found

    def without(self, factor: str, levels: Sequence[Level]) -> Evidence:
        """The same without the points at these levels."""
        rest = copy(self)
        rest.points = [point for point in self.points if point[factor] not in levels]
        return rest

    def mean(self, **where: Level) -> Contrast | None:
        """Over all finished points with these levels; None without any."""
        terms = {cell_of(point): (1.0, point) for point in self.points if _has(point, where)}
        return self._contrast(", ".join(map(str, where.values())), list(terms.values()))

    def difference(self, factor: str, high: Level, low: Level, **where: Level) -> Contrast | None:
        """`high` minus `low` over all points that differ in nothing else; None without any such pair."""
        text = f"{factor}: {high} - {low}" + "".join(f", {name} = {level}" for name, level in where.items())
        pairs = self._pairs(factor, high, low, where)
        found = self._contrast(text, [term for below, above in pairs for term in ((-1.0, below), (1.0, above))])
        return replace(found, levels=(high, low)) if found else None

    def interaction(self, factor: str, high: Level, low: Level, other: str, at: Level, than: Level) -> Contrast | None:
        """How much larger the difference is where `other` is `at` than where it is `than`."""
        terms: list[tuple[float, Point]] = []
        for below, above in self._pairs(factor, high, low, {other: at}):
            twins = [_find(self.points, {**point, other: than}) for point in (below, above)]
            if twins[0] is not None and twins[1] is not None:
                terms += [(-1.0, below), (1.0, above), (1.0, twins[0]), (-1.0, twins[1])]
        text = f"({factor}: {high} - {low}) at {other} = {at}, minus the same at {than}"
        return self._contrast(text, terms, unit=2.0)

    def _pairs(self, factor: str, high: Level, low: Level, where: dict[str, Level]) -> list[tuple[Point, Point]]:
        """(low, high) points, once for the same two cells."""
        found = {}
        for point in self.points:
            if point[factor] == high and _has(point, where):
                twin = _find(self.points, {**point, factor: low})
                if twin is not None and (cells := (cell_of(twin), cell_of(point)))[0] != cells[1]:
                    found[cells] = twin, point
        return list(found.values())

    def _contrast(self, text: str, terms: Sequence[tuple[float, Point]], unit: float = 1.0) -> Contrast | None:
        """Weighted points. In every task the positive weights are brought to a sum of `unit`; tasks count alike."""
        by_task: dict[Level, Counter[str]] = defaultdict(Counter)
        total: Counter[Level] = Counter()
        for weight, point in terms:
            by_task[point["task"]][cell_of(point)] += weight  # type: ignore[assignment]
            total[point["task"]] += max(weight, 0.0)  # type: ignore[assignment]
        parts = [
            weighted(self._scores, {cell: unit * weight / total[task] for cell, weight in cells.items()})
            for task, cells in by_task.items()
        ]
        interval = bootstrap(join(parts)) if parts else None
        names = tuple(sorted({cell for cells in by_task.values() for cell in cells}))
        return Contrast(text, interval, names) if interval else None


def cell_of(point: Point) -> str:
    """Name of the point's cell, without a seed."""
    return Cell(canonical(point), 0).name.rpartition("-seed")[0]


def _has(point: Point, where: dict[str, Level]) -> bool:
    seen = canonical(point)
    return all(seen[factor] == level for factor, level in where.items())


def _find(points: Sequence[Point], wanted: Point) -> Point | None:
    return next((point for point in points if point == wanted), None)
