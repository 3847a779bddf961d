"""The family table cuts exactly what belongs together: by torch-pruning's dependency graph, and by gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn

from fedspine.errors import ModelError
from fedspine.pruning.families import FAMILIES, describe, family_of, projections
from fedspine.structure import ModuleShape
from tests.tiny import ENCODERS, TARGETS, TINY, tiny_model, tokens

UNGROUPED = {family: {"num_key_value_heads": 8} for family in TINY if "num_key_value_heads" in TINY[family]}
"""torch-pruning loses the query heads behind a repeated key-value head."""


def coupled(model: nn.Module, source: ModuleShape, feature: int) -> dict[tuple[str, str], set[int]]:
    """{(projection, axis): indices} that torch-pruning cuts with one output feature of a projection."""
    batch = tokens()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=(batch["input_ids"], batch["attention_mask"]), output_transform=lambda out: out.logits
    )
    names = {module: name for name, module in model.named_modules()}
    linear = model.get_submodule(source.name)
    found: dict[tuple[str, str], set[int]] = {}
    for item in graph.get_pruning_group(linear, torch_pruning.prune_linear_out_channels, idxs=[feature]):
        if isinstance(item.dep.target.module, nn.Linear):
            axis = "rows" if "out_channels" in item.dep.handler.__name__ else "columns"
            found.setdefault((names[item.dep.target.module], axis), set()).update(item.idxs)
    return found


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_those_of_the_dependency_graph(family: str) -> None:
    """The same projections, and the same row or column in each of them."""
    model = tiny_model(family, use_cache=False)
    modules = [module for module in projections(model, family) if module.unit == "channels"]
    for source in modules:
        if source.role in ("up", "gate_up"):
            expected = {
                (module.name, module.axis): set(np.flatnonzero(module.features(np.arange(32) == 5)))
                for module in modules
                if module.layer == source.layer
            }
            assert coupled(model, source, 5) == expected


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("family", [family for family in FAMILIES if "qkv" not in family_of(family).roles])
def test_heads_are_those_of_the_dependency_graph(family: str) -> None:
    """The same projections. In a fused one it miscounts the rows: `belonging` sees to these."""
    model = tiny_model(family, use_cache=False, **UNGROUPED.get(family, {}))
    modules = [module for module in projections(model, family) if module.unit == "heads"]
    for source in modules:
        if source.role == "v":
            expected = {(module.name, module.axis) for module in modules if module.layer == source.layer}
            assert coupled(model, source, 0).keys() == expected


def belonging(model: nn.Module, module: ModuleShape) -> Iterator[dict[str, torch.Tensor]]:
    """For each unit of `o` or `down`: the rows, of all parameters, that its inputs depend on and no other unit's do."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module.name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(**tokens())
    handle.remove()
    names, parameters = zip(*model.named_parameters(), strict=True)
    units = module.d_in // module.unit_size
    weights = torch.rand(seen[0].shape, generator=torch.Generator().manual_seed(0))
    touched = []
    for unit in range(units):
        part = torch.from_numpy(module.features(np.arange(units) == unit))
        gradients = torch.autograd.grad(
            (seen[0] * weights)[..., part].sum(), parameters, retain_graph=True, materialize_grads=True
        )
        touched.append(
            [(gradient != 0).flatten(1).any(1) if gradient.ndim > 1 else gradient != 0 for gradient in gradients]
        )
    for unit in range(units):
        yield {
            name: touched[unit][index] & (sum(each[index].int() for each in touched) == 1)
            for index, name in enumerate(names)
        }


def check_rows(family: str) -> None:
    """Every head (group) and channel owns the listed rows of its layer, with their biases, and nothing else."""
    model = tiny_model(family)
    modules = projections(model, family)
    for module in modules:
        if module.axis == "rows":
            continue
        rows = {m.name: m for m in modules if (m.layer, m.unit, m.axis) == (module.layer, module.unit, "rows")}
        for unit, owned in enumerate(belonging(model, module)):
            one = np.arange(module.d_in // module.unit_size) == unit
            for name, found in owned.items():
                projection, _, kind = name.rpartition(".")
                listed = np.zeros(len(found), bool)
                if projection in rows:
                    listed = rows[projection].features(one)
                if kind == "bias":  # the softmax does not see a bias of the keys
                    assert not (found.numpy() & ~listed).any(), name
                else:
                    assert (found.numpy() == listed).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_owns_exactly_its_rows(family: str) -> None:
    check_rows(family)


def without(roles: Mapping[str, str], role: str) -> dict[str, str]:
    return {name: path for name, path in roles.items() if name != role}


def exchanged(roles: Mapping[str, str], one: str, other: str) -> dict[str, str]:
    return {**roles, one: roles[other], other: roles[one]}


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("bert", {"roles": without(family_of("bert").roles, "k")}),
        ("bert", {"roles": exchanged(family_of("bert").roles, "up", "down")}),
        ("llama", {"roles": without(family_of("llama").roles, "gate")}),
        ("llama", {"roles": exchanged(family_of("llama").roles, "v", "o")}),
        ("phi3", {"head_by_head": True}),
        ("gpt_neox", {"head_by_head": False}),
    ],
)
def test_a_wrong_entry_is_found(monkeypatch: pytest.MonkeyPatch, family: str, wrong: dict[str, object]) -> None:
    monkeypatch.setitem(FAMILIES, family, replace(family_of(family), **wrong))  # type: ignore[arg-type]
    with pytest.raises((AssertionError, ModelError)):
        check_rows(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family: str) -> None:
    model = tiny_model(family)
    shape = describe(model, family, TARGETS)
    grouped = "num_key_value_heads" in TINY[family]
    size = int(TINY[family].get("head_dim", 6))  # type: ignore[call-overload]
    assert (shape.layers, shape.hidden, shape.heads, shape.channels) == (2, 24, 4, 32)
    assert (shape.queries, shape.head_dim) == ((2, 2 * size) if grouped else (1, size))
    assert shape.head_weights == size * 24 * (2 * shape.queries + 2)
    assert shape.channel_weights == 24 * (3 if set(family_of(family).roles) & {"gate", "gate_up"} else 2)


@pytest.mark.parametrize("family", ENCODERS)
def test_parameters_by_hand(family: str) -> None:
    shape = describe(tiny_model(family), family, TARGETS)
    assert shape.head_parameters == 6 * (4 * 24 + 3)
    assert shape.channel_parameters == 2 * 24 + 1


def test_targets_of_fused_projections() -> None:
    """A role that a family has only fused means the fused projection, once."""

    def adapted(family: str, *targets: str) -> set[str]:
        modules = describe(tiny_model(family), family, targets).modules
        assert len({module.name for module in modules}) == len(modules)
        return {module.role for module in modules}

    assert adapted("phi3", "q", "v", "o", "up", "down") == {"qkv", "o", "gate_up", "down"}
    assert adapted("phi3", "gate") == {"gate_up"}
    assert adapted("gpt_neox", "k", "up") == {"qkv", "up"}
    assert adapted("llama", "q", "up") == {"q", "up"}
    assert adapted("llama", "gate") == {"gate"}


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(
        ModelError, match=r"'gpt2' is not supported; supported: bert, roberta, .*, gpt_neox. To add one"
    ):
        family_of("gpt2")
    for family in ("bert", "gpt_neox"):
        with pytest.raises(ModelError, match="lora_targets has 'gate'"):
            describe(tiny_model(family), family, ("gate",))


def test_layers_must_be_equal() -> None:
    model = tiny_model("llama")
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(24, 30))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj' has another size than in layer 0"):
        describe(model, "llama", TARGETS)
