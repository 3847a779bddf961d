"""Flower and PEFT in the FlowerTune pattern: a `ClientApp` that trains the adapters of a message, FedAvg as strategy.

    python -m benchmarks.peers.flowertune --data DIR

One process, one client after the other; the model with its adapters is made once and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader

from benchmarks.peers import common
from benchmarks.peers.common import Clock, Features, Task, Work
from fedspine.flower.inline import FIRST_NODE_ID, RUN_ID, InlineGrid


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = common.start(common.harness_options().parse_args())
    task, model, clock = common.load_task(work), common.load_model(work), Clock()
    reached = 0.0

    def after_round(round: int, arrays: ArrayRecord) -> None:
        nonlocal reached
        if round:
            clock.stop()
        if round == work.all_rounds:
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            reached = common.accuracy(model, task)
        clock.start()

    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        start = ArrayRecord(get_peft_model_state_dict(model, save_embedding_layers=False))
        FedAvgOf(work).start(grid, start, work.all_rounds, evaluate_fn=after_round)

    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server(InlineGrid(client_app(work, task, model), common.CLIENTS), context)
    common.report(clock.seconds, reached, "flwr")


class FedAvgOf(FedAvg):
    """Flower's FedAvg with the clients of the comparison; a client that fails ends the run."""

    def __init__(self, work: Work) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._work = work

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = [FIRST_NODE_ID + client for client in common.clients_of(self._work, server_round)]
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(content, nodes, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"round {server_round}: {reply.error.reason}")
        return super().aggregate_train(server_round, replies)


def client_app(work: Work, task: Task, model: PeftModel) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        rows = task.clients[int(context.node_config["partition-id"])]
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        loss = tune(model, rows, work, task)
        arrays = ArrayRecord(get_peft_model_state_dict(model, save_embedding_layers=False))
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def tune(model: PeftModel, rows: list[Features], work: Work, task: Task) -> float:
    """The local steps of a client; returns the mean loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE, weight_decay=0.0)
    model.train()
    total = 0.0
    batches = DataLoader(rows, common.BATCH, sampler=common.shuffled(rows, work), collate_fn=task.collate)
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, common.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / work.steps


if __name__ == "__main__":
    main()
