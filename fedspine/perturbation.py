"""What goes wrong on the simulated devices of a run: the key `perturbation`.

none
dropout:0.3       that share of all devices, drawn anew in every round, drops out of it after the download
slowdown:0.2x4    that share of the devices, drawn once, computes four times as long
link:0.25         every link has that share of its bandwidth
memory:0.5        every device has that share of its memory in the second half of the rounds
"""

from __future__ import annotations

from dataclasses import dataclass

from fedspine.errors import ConfigError

KINDS = ("none", "dropout:SHARE", "slowdown:SHARExFACTOR", "link:SCALE", "memory:SCALE")


@dataclass(frozen=True)
class Perturbation:
    """One of the kinds."""

    kind: str = "none"
    share: float = 1.0
    """Of the devices (dropout, slowdown), or of what is left (link, memory)."""
    factor: float = 1.0
    """On the compute time of a slow device."""

    def of(self, kind: str) -> float:
        """What is left of a link's bandwidth or of memory: 1 where another kind, or none, is at work."""
        return self.share if self.kind == kind else 1.0


UNPERTURBED = Perturbation()


def parse_perturbation(text: str) -> Perturbation:
    """Errors: `ConfigError` for an unknown kind, or a number that is out of bounds."""
    kind, _, amounts = text.partition(":")
    if text == "none":
        return UNPERTURBED
    share, times, factor = amounts.partition("x")
    if kind not in ("dropout", "slowdown", "link", "memory") or bool(times) != (kind == "slowdown"):
        raise ConfigError(f"perturbation = {text!r}: must be one of {', '.join(KINDS)}, such as slowdown:0.2x4")
    found = Perturbation(kind, _number(share), _number(factor) if times else 1.0)
    least_factor = 1.0 if times else 0.0
    if not 0 < found.share <= (1.0 if times else 0.95) or not least_factor < found.factor <= 1000:
        raise ConfigError(
            f"perturbation = {text!r}: SHARE and SCALE must be numbers above 0 and at most 0.95 (1 for slowdown), "
            "FACTOR above 1 and at most 1000"
        )
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0
