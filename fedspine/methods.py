"""The methods that `method` names: FedSpine, and the baselines that it is compared with. Each is a preset of keys."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "sampling": "uniform",
    "roll_call": False,
    "adapter_rate": "equal",
    "wire_dtype": "float32",
    "regrowth": False,
    "logit_adjustment": 0.0,
    "local_work": "equal",
    "rate_schedule": "constant",
    "ramp_ratio": 0.6,
}
"""Without the levers that FedSpine has beyond the paper. The ramp is the long one: with the short one
LoRAPrune and APT, which take no cut back, lost a point on the one seed that was tried (experiments/levers)."""
_PRUNED: dict[str, Any] = {**PLAIN, "policy": "fixed", "aggregation": "coordinate"}
"""The same ratio and rank for all devices, one shared mask."""
_UNPRUNED: dict[str, Any] = {**_PRUNED, "target_sparsity": 0.0}

METHODS: dict[str, dict[str, Any]] = {
    "fedspine": {},
    "fedspine-paper": {
        **PLAIN,
        "policy": "s-ucb",
        "importance": "lora-gradient",
        "masks": "own",
        "reward": "paper",
        "max_step_ratio": 0.15,
    },
    "fedavg": _UNPRUNED,
    "fedit": _UNPRUNED,
    "fedprox": {**_UNPRUNED, "proximal": 0.01},
    "ffa-lora": {**_UNPRUNED, "trained_factors": "b"},
    "rolora": {**_UNPRUNED, "trained_factors": "alternate"},
    "flexlora": {**_UNPRUNED, "aggregation": "flex"},
    "lora-fair": {**_UNPRUNED, "aggregation": "fair"},
    "hetlora": {**_UNPRUNED, "aggregation": "het", "policy": "tertile", "rank_decay": 0.99, "probe": "first"},
    "flora": {**_UNPRUNED, "fold": "all"},
    "fedex-lora": {**_UNPRUNED, "fold": "residual"},
    "fedsa-lora": {**_UNPRUNED, "trained_factors": "local-b"},
    "loraprune": {**_PRUNED, "importance": "lora-gradient"},
    "llm-pruner": {**_PRUNED, "importance": "taylor", "schedule": "one-shot"},
    "apt": {**_PRUNED, "aggregation": "zero-pad", "layer_budget": "global", "rank_growth": 2.0, "max_rank": 32},
    "magnitude": {**_PRUNED, "importance": "magnitude"},
    "random-pruning": {**_PRUNED, "importance": "random"},
    "fedmp": {
        **PLAIN,
        "policy": "e-ucb",
        "importance": "l1",
        "masks": "own",
        "regrowth": True,
        "ramp_ratio": 0.25,
        "aggregation": "r2sp",
        "reward": "fedmp",
    },
}
"""What each method changes from the defaults of `RunConfig`."""

SOURCES: dict[str, str] = {
    "fedspine": "what measured best here",
    "fedspine-paper": "faithful to FedSpine (arXiv 2501.02438)",
    "fedavg": "unpruned LoRA, both factors averaged: the reference",
    "fedit": "another name of fedavg: FedIT (arXiv 2305.05644)",
    "fedprox": "fedit with a pull towards what was received: FedProx (arXiv 1812.06127)",
    "ffa-lora": "A frozen at the shared start, B trained, half the traffic: FFA-LoRA (arXiv 2403.12313)",
    "rolora": "B in odd rounds, A in even ones: RoLoRA (arXiv 2502.01755)",
    "flexlora": "products averaged and cut back to the rank by SVD: FlexLoRA (arXiv 2402.11505)",
    "lora-fair": "factors averaged, B corrected towards the average product: LoRA-FAIR (arXiv 2411.14961)",
    "hetlora": "ranks by speed that shrink by themselves, zero-padded, weighted by norm: HetLoRA (arXiv 2401.06432)",
    "flora": "products summed exactly into the weights, new adapters every round: FLoRA (arXiv 2409.05976)",
    "fedex-lora": "factors averaged, the rest of the product into the weights: FedEx-LoRA (arXiv 2410.09432)",
    "fedsa-lora": "A shared, B and the head of each device's own: FedSA-LoRA (arXiv 2410.01463)",
    "loraprune": "LoRA-gradient scores, the same ratio for all on a cubic ramp: LoRAPrune (arXiv 2305.18403)",
    "llm-pruner": "cut at once after the warm-up by Taylor scores, then tuned: LLM-Pruner (arXiv 2305.11627)",
    "apt": "mask-gradient scores per parameter, ranks grow where they matter: APT (arXiv 2401.12200)",
    "magnitude": "the same ratio for all, smallest weights first: the classic control",
    "random-pruning": "the same ratio for all, drawn at random: the control of every score",
    "fedmp": "ratio by E-UCB, cut anew in every round by L1 norms, R2SP: FedMP (doi 10.1109/ICDE53745.2022.00062)",
}
"""What each method is, and where it comes from."""
