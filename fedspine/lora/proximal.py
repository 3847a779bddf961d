"""FedProx (arXiv 1812.06127) on adapters and head: mu/2 ||w - w_received||^2 beside the loss of a local round."""

from __future__ import annotations

import torch

from fedspine.lora.resident import ResidentModel
from fedspine.structure import Structure


class Proximal:
    """Pulls what is trained towards what was received."""

    def __init__(self, resident: ResidentModel, mu: float) -> None:
        """Take what is mounted now as received."""
        self._resident = resident
        self._mu = mu
        self._received = {name: parameter.detach().clone() for name, parameter in resident.parameters.items()}

    def add_gradients(self) -> None:
        """mu (w - w_received), to the gradients of the loss."""
        with torch.no_grad():
            for name, parameter in self._resident.parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - self._received[name], alpha=self._mu)

    def cut(self, structure: Structure) -> None:
        """Slice what was received; call it before the mounted model is cut."""
        for name, value in self._received.items():
            keep = self._resident.still_kept(name, structure)
            if keep is not None:
                index = torch.from_numpy(keep[1]).to(value.device)
                self._received[name] = value.index_select(keep[0], index)
