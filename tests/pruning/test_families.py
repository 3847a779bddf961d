"""The family table cuts exactly the rows and columns that torch-pruning's dependency graph finds coupled."""

from __future__ import annotations

import pytest
import torch
import torch_pruning

from fedspine.errors import ModelError
from fedspine.pruning.families import FAMILIES, describe, family_of, linear_layers, unit_of
from tests.tiny import TARGETS, tiny_model, tokens


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(("source", "unit"), [("q", "heads"), ("up", "channels")])
def test_table_agrees_with_the_dependency_graph(family: str, source: str, unit: str) -> None:
    model = tiny_model(family)
    batch = tokens()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=(batch["input_ids"], batch["attention_mask"]), output_transform=lambda out: out.logits
    )
    names = {module: name for name, module in model.named_modules()}
    for roles in linear_layers(model, family_of(family)):
        linear = model.get_submodule(roles[source])
        group = graph.get_pruning_group(linear, torch_pruning.prune_linear_out_channels, idxs=[0])
        found = {
            (names[item.dep.target.module], "rows" if "out_channels" in item.dep.handler.__name__ else "columns")
            for item in group
            if isinstance(item.dep.target.module, torch.nn.Linear)
        }
        assert found == {(name, unit_of(role)[1]) for role, name in roles.items() if unit_of(role)[0] == unit}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_counts(family: str) -> None:
    shape = describe(tiny_model(family), family, TARGETS)
    assert (shape.layers, shape.hidden, shape.heads, shape.head_dim, shape.channels) == (2, 24, 4, 6, 32)
    assert shape.head_parameters == 6 * (4 * 24 + 3)
    assert shape.channel_parameters == 2 * 24 + 1
    assert len(shape.modules) == 2 * len(TARGETS)


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: bert, roberta"):
        family_of("gpt2")
    with pytest.raises(ModelError, match="lora_targets has 'gate'"):
        describe(tiny_model(), "bert", ("gate",))
    assert set(FAMILIES) >= {"bert", "roberta"}
