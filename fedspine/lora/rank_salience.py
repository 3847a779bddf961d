"""How much the adapters of a projection matter: what APT (arXiv 2401.12200, section 4.3) allots ranks by."""

from __future__ import annotations

import numpy as np

from fedspine.lora.resident import ResidentModel

DECAY = 0.85
"""Of the moving average over local iterations (APT)."""


class RankSalience:
    """Mean over the components k of |sum_j A_kj dL/dA_kj| of every projection, smoothed."""

    def __init__(self, resident: ResidentModel) -> None:
        self._resident = resident
        self._sums = np.zeros(len(resident.shape.modules))
        self._mass = 0.0

    def observe(self) -> None:
        """Between backward and the optimiser's step."""
        now = []
        for module in self._resident.shape.modules:
            a = self._resident.parameters[f"{module.name}.A"]
            now.append(0.0 if a.grad is None else float((a.detach() * a.grad).sum(1).abs().mean()))
        self._sums = DECAY * self._sums + (1.0 - DECAY) * np.array(now)
        self._mass = DECAY * self._mass + (1.0 - DECAY)

    def values(self) -> tuple[float, ...]:
        """In the order of the shape's projections."""
        return tuple((self._sums / max(self._mass, 1e-12)).tolist())
