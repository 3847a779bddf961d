"""pfl-research: `FederatedAveraging` on a `SimulatedBackend`, with its PyTorch model around the same PEFT model.

    python -m benchmarks.peers.pfl --data DIR

It needs an environment with pfl 0.6, torch, transformers and peft.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.peers import common
from benchmarks.peers.common import Clock, Features, Task, Work


def main() -> None:
    work = common.start(common.harness_options().parse_args())
    task, model, clock = common.load_task(work), common.load_model(work), Clock()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    order = chain.from_iterable(common.clients_of(work, round) for round in range(1, work.all_rounds + 1))
    data = FederatedDataset(partial(client_data, work=work, task=task), order.__next__)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.all_rounds,
            evaluation_frequency=work.all_rounds + 1,  # clients evaluate in the warm-up round only
            train_cohort_size=work.sampled,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(
            model=WithLoss(model),
            local_optimizer_create=partial(torch.optim.AdamW, weight_decay=0.0),
            central_optimizer=torch.optim.SGD(trained, lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_batch_size=common.BATCH,
            local_num_epochs=None,
            local_num_steps=work.steps,
            local_learning_rate=common.LEARNING_RATE,
            local_max_grad_norm=common.CLIP_NORM,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=common.BATCH),
        callbacks=[RoundClock(clock)],
    )
    common.report(clock.seconds, common.accuracy(model, task), "pfl")


class WithLoss(torch.nn.Module):
    """The model in the form that pfl asks for."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        self.model.train()
        return self.model(**batch).loss

    def metrics(self, **batch: torch.Tensor) -> dict[str, Weighted]:
        with torch.inference_mode():
            logits = self.model(**batch).logits
        labels = batch["labels"]
        return {"accuracy": Weighted(int((logits.argmax(-1) == labels).sum()), len(labels))}


class RoundClock(TrainingProcessCallback):
    """Marks the end of every round, which is the start of the next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._clock.stop()
        self._clock.start()
        return False, Metrics()


def client_data(client: int, work: Work, task: Task) -> PyTorchDataDataset:
    rows = task.clients[client]

    def collate(features: list[Features]) -> dict[str, Any]:
        return dict(task.collate(features))  # pfl passes a mapping by name only when it is a dict

    return PyTorchDataDataset(rows, sampler=common.shuffled(rows, work), collate_fn=collate)


if __name__ == "__main__":
    main()
