"""Exact aggregation: what the averaged factors cannot hold of a round is folded into the frozen weights.

The configuration key `fold`. The server keeps the sum of all that was folded as `<module>.W` [d_out, d_in] among its
adapters, in units of B A; a model has `scale * W` added to its frozen weights. With the shares p_i of the devices:

`all`: FLoRA (arXiv 2409.05976). W += sum p_i B_i A_i, the stacked factors; every device draws new adapters for every
round, from the run's seed.
`residual`: FedEx-LoRA (arXiv 2410.09432). A and B are averaged as in FedIT, and W += sum p_i B_i A_i - B A, with the
averages B and A; ranks below the server's are padded with zeros.

Traffic: a device keeps its W between rounds and is sent what it missed, as factors: of a FLoRA round those of all
devices, joined; of a FedEx-LoRA round sum over i < N of p_i (B_i - B) (A_i - A_N), which is the residual, of rank
(N - 1) r. Where all that a device missed of a matrix is larger as factors, it is sent the matrix. A simulation
carries W itself, and counts the above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation.update import Update
from fedspine.lora.adapters import HEAD, widen
from fedspine.structure import ModelShape
from fedspine.types import TRAINED, Array, Arrays, RoundRecord


def folded(choice: str, current: Arrays, joined: Arrays, updates: Sequence[Update], shape: ModelShape) -> Arrays:
    """The global adapters after a round, with W; `joined` is what averaging the factors has made of `current`."""
    if choice == "none":
        return joined
    result = dict(joined)
    if choice == "all":
        result |= {name: array for name, array in current.items() if not name.startswith(HEAD)}
    total = sum(update.weight for update in updates)
    wide = [widen(update.arrays, update.structure, shape) for update in updates]
    shares = [np.float32(update.weight / total) for update in updates]
    for module in shape.modules:
        a, b, w = (f"{module.name}.{part}" for part in "ABW")
        stacked = np.concatenate([share * each[a] for share, each in zip(shares, wide, strict=True)])
        change: Array = np.concatenate([each[b] for each in wide], axis=1) @ stacked
        if choice == "residual":
            change = change - joined[b] @ joined[a]
        result[w] = current[w] + change if w in current else change
    return result


def missed_ranks(choice: str, records: Sequence[RoundRecord], devices: Sequence[int]) -> list[int]:
    """Summed rank of the changes of W that each device has not been sent; 0 where nothing is folded.

    A request brings a device what it missed, whether it then trained or not. One that counted no bytes was not reached.
    """
    if choice == "none":
        return [0] * len(devices)
    ranks, reached = [], dict[int, int]()
    for record in records:
        trained = [pull.report.rank_after for pull in record.pulls if pull.report.outcome == TRAINED]
        ranks.append(sum(trained) if choice == "all" else (len(trained) - 1) * max(trained))
        reached |= {pull.device: record.round for pull in record.pulls if pull.report.download_bytes}
    return [sum(ranks[reached.get(device, 1) - 1 :]) for device in devices]
