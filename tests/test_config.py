"""Keys, presets and files: what comes back, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedspine.config import METHODS, RunConfig, load_config, parse_override, saved_config
from fedspine.errors import ConfigError

UNUSUAL: dict[str, Any] = {
    "method": "fedspine-paper",
    "seed": 2**31 - 1,
    "model": 'C:\\models\\"odd" näme\t🙂',
    "data": "../shared/data/sst2",
    "learning_rate": 3e-8,
    "dirichlet_alpha": 1e4,
    "lora_targets": ("q", "v"),
    "probe": "never",
    "devices": 1_000_000,
    "target_sparsity": 0.1 + 0.2,
    "gradient_checkpointing": True,
    "rounds": 7,
}


RANKS = {
    "min_rank": {"max_rank": 1024, "fixed_rank": 1024},
    "max_rank": {"min_rank": 1, "fixed_rank": 1},
    "fixed_rank": {"min_rank": 1, "max_rank": 1024},
    "rank_growth": {"policy": "fixed", "aggregation": "zero-pad"},
}
"""Values of other keys that any bound of this one goes with."""


BESIDE = {
    "trained_factors": {"aggregation": "coordinate"},
    "fold": {"policy": "fixed", "aggregation": "coordinate", "target_sparsity": 0.0, "wire_dtype": "float32"},
}
"""Values of other keys that any choice of this one goes with."""


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_values(values)
    return str(caught.value)


def test_defaults_are_the_measured_method() -> None:
    config = RunConfig.from_values({})
    assert config == RunConfig()
    assert config.method == "fedspine"
    assert config.uses_probe


def test_every_key_has_a_help_and_a_default_within_its_bounds() -> None:
    for field in dataclasses.fields(RunConfig):
        assert field.metadata["key"].help
        assert field.default is not dataclasses.MISSING


@pytest.mark.parametrize("method", METHODS)
def test_preset_changes_its_keys_and_no_other(method: str) -> None:
    config = RunConfig.from_values({"method": method})
    expected = {**dataclasses.asdict(RunConfig()), **METHODS[method], "method": method}
    assert dataclasses.asdict(config) == expected


def test_presets_differ_where_the_methods_do() -> None:
    paper, fedavg = (RunConfig.from_values({"method": method}) for method in ("fedspine-paper", "fedavg"))
    assert (paper.policy, paper.importance, paper.masks, paper.reward) == ("s-ucb", "lora-gradient", "own", "paper")
    assert (fedavg.policy, fedavg.aggregation, fedavg.target_sparsity) == ("fixed", "coordinate", 0.0)
    assert not paper.uses_probe
    assert not fedavg.uses_probe


def test_own_values_win_over_the_preset() -> None:
    config = RunConfig.from_values({"method": "fedavg", "target_sparsity": 0.25, "rounds": 3})
    assert (config.target_sparsity, config.rounds, config.policy) == (0.25, 3, "fixed")


@pytest.mark.parametrize("values", [{}, *({"method": method} for method in METHODS), UNUSUAL])
def test_toml_comes_back_equal(tmp_path: Path, values: dict[str, Any]) -> None:
    config = RunConfig.from_values(values)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path, {}) == config
    assert load_config(path, {}).to_toml() == config.to_toml()


def test_toml_names_every_key_once_below_its_help() -> None:
    lines = RunConfig().to_toml().splitlines()
    for field in dataclasses.fields(RunConfig):
        places = [number for number, line in enumerate(lines) if line.startswith(f"{field.name} = ")]
        assert len(places) == 1
        assert lines[places[0] - 1] == f"# {field.metadata['key'].help}"


def test_toml_escapes_the_delete_character(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(RunConfig(data="odd\x7fname").to_toml(), encoding="utf-8")
    assert load_config(path, {}).data == "odd\x7fname"


@pytest.mark.parametrize("values", [{}, *({"method": method} for method in METHODS), UNUSUAL])
def test_json_comes_back_equal(values: dict[str, Any]) -> None:
    config = RunConfig.from_values(values)
    assert RunConfig.from_json(config.to_json()) == config
    assert list(json.loads(config.to_json())) == sorted(field.name for field in dataclasses.fields(RunConfig))


def test_config_is_frozen_and_hashable() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 3  # type: ignore[misc]
    assert hash(config) == hash(RunConfig())
    assert config != RunConfig(rounds=3)


def test_replacing_a_value_checks_it() -> None:
    with pytest.raises(ConfigError, match="rounds = 0"):
        dataclasses.replace(RunConfig(), rounds=0)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('rounds = 4\nseed = 9\nmethod = "fedavg"\n')
    config = load_config(path, {"rounds": 5})
    assert (config.rounds, config.seed, config.policy) == (5, 9, "fixed")
    assert load_config(path, {"method": "fedspine-paper"}).policy == "s-ucb"
    assert load_config(None, {"rounds": 6}) == RunConfig(rounds=6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=20", ("rounds", 20)),
        (" rounds = 20 ", ("rounds", 20)),
        ("learning_rate=1e-4", ("learning_rate", 1e-4)),
        ("probe=never", ("probe", "never")),
        ("method=fedavg", ("method", "fedavg")),
        ('method="fedavg"', ("method", "fedavg")),
        ("model=C:\\models\\small", ("model", "C:\\models\\small")),
        ("partition=column:a=b", ("partition", "column:a=b")),
        ("lora_targets=q,v", ("lora_targets", "q,v")),
        ('lora_targets=["q", "v"]', ("lora_targets", ["q", "v"])),
        ("text_column=", ("text_column", "")),
        ("gradient_checkpointing=true", ("gradient_checkpointing", True)),
    ],
)
def test_override_of_the_command_line(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected
    RunConfig.from_values(dict([expected]))


@pytest.mark.parametrize("text", ["rounds", "=20", "", " = "])
def test_override_without_key_or_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert str(caught.value) == f"-s {text!r}: write it as key=value, for example -s rounds=20"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("round", "rounds"),
        ("learning-rate", "learning_rate"),
        ("device", "devices"),
        ("target_sparcity", "target_sparsity"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, right: str) -> None:
    assert refusal(**{wrong: 1}) == (
        f"unknown key '{wrong}': did you mean '{right}'? `fedspine keys` lists all of them"
    )


def test_unknown_key_unlike_any_other_is_still_refused() -> None:
    assert refusal(**{"§": 1}).startswith("unknown key '§': did you mean '")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rounds": 20.0}, "rounds = 20.0: must be a whole number, such as 12"),
        ({"rounds": "20"}, "rounds = '20': must be a whole number, such as 12"),
        ({"rounds": True}, "rounds = True: must be a whole number, such as 12"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast': must be a number, such as 0.001"),
        ({"learning_rate": True}, "learning_rate = True: must be a number, such as 0.001"),
        ({"probe": 1}, 'probe = 1: must be a text, such as "always"'),
        ({"probe": True}, 'probe = True: must be a text, such as "always"'),
        ({"model": 7}, 'model = 7: must be a text, such as "all-MiniLM-L6-v2"'),
        ({"model": None}, 'model = None: must be a text, such as "all-MiniLM-L6-v2"'),
        ({"lora_targets": 3}, 'lora_targets = 3: must be a list of words, such as ["q", "v", "o", "up", "down"]'),
        ({"lora_targets": []}, 'lora_targets = []: must be a list of words, such as ["q", "v", "o", "up", "down"]'),
        ({"lora_targets": [1]}, 'lora_targets = [1]: must be a list of words, such as ["q", "v", "o", "up", "down"]'),
    ],
)
def test_wrong_type(values: dict[str, Any], expected: str) -> None:
    assert refusal(**values) == expected


def test_whole_number_is_a_number() -> None:
    config = RunConfig.from_values({"learning_rate": 1, "target_sparsity": 0})
    assert (config.learning_rate, config.target_sparsity) == (1.0, 0.0)
    assert isinstance(config.learning_rate, float)
    assert config.to_json() == RunConfig(learning_rate=1.0, target_sparsity=0.0).to_json()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"seed": 2**31}, "seed = 2147483648: must be at most 2.14748e+09"),
        ({"max_length": 3}, "max_length = 3: must be at least 4"),
        ({"target_sparsity": 0.96}, "target_sparsity = 0.96: must be at most 0.95"),
        ({"target_sparsity": -0.1}, "target_sparsity = -0.1: must be at least 0"),
        ({"quorum": 1.5}, "quorum = 1.5: must be at most 1"),
        ({"learning_rate": 0}, "learning_rate = 0.0: must be at least 1e-08"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: must be at least 1e-08"),
        ({"learning_rate": float("inf")}, "learning_rate = inf: must be at most 1"),
        ({"dirichlet_alpha": 0.0}, "dirichlet_alpha = 0.0: must be at least 0.01"),
    ],
)
def test_out_of_bounds(values: dict[str, Any], expected: str) -> None:
    assert refusal(**values) == expected


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda field: field.name)
def test_every_bound_is_kept(field: dataclasses.Field[Any]) -> None:
    """The bound itself is taken, the value just outside is refused by name."""
    key = field.metadata["key"]
    for bound, step, words in ((key.minimum, -1, "at least"), (key.maximum, 1, "at most")):
        if bound is None:
            continue
        outside = bound + step if isinstance(field.default, int) else bound + step * 1e-9 * max(1.0, abs(bound))
        assert refusal(**{field.name: outside}).startswith(f"{field.name} = {outside}: must be {words} {bound:g}")
        together = {
            "devices": 1_000_000,
            "sampled": 1,
            "ramp_ratio": 1.0,
            "warmup_ratio": 0.0,
            "public_examples": 1,
            **RANKS.get(field.name, {}),
        }
        assert getattr(RunConfig.from_values({**together, field.name: bound}), field.name) == bound


def test_number_beyond_floats_is_refused() -> None:
    assert refusal(learning_rate=10**400).startswith("learning_rate = ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"importance": "fischer"},
            "importance = 'fischer': must be one of fisher, lora-gradient, magnitude, l1, random, taylor "
            "(did you mean 'fisher'?)",
        ),
        ({"masks": "xyz"}, "masks = 'xyz': must be one of shared, own, mixed"),
        ({"schedule": "oneshot"}, "schedule = 'oneshot': must be one of cubic, one-shot (did you mean 'one-shot'?)"),
        ({"method": "fedproxy"}, f"method = 'fedproxy': must be one of {', '.join(METHODS)}"),
        ({"method": 3}, f"method = 3: must be one of {', '.join(METHODS)}"),
        ({"method": ["fedavg"]}, f"method = ['fedavg']: must be one of {', '.join(METHODS)}"),
        ({"lora_targets": ["q", "w"]}, "lora_targets = ['q', 'w']: 'w' must be one of q, k, v, o, gate, up, down"),
        ({"lora_targets": "q,w"}, "lora_targets = 'q,w': 'w' must be one of q, k, v, o, gate, up, down"),
    ],
)
def test_not_among_the_choices(values: dict[str, Any], expected: str) -> None:
    assert refusal(**values) == expected


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda field: field.name)
def test_every_choice_is_taken(field: dataclasses.Field[Any]) -> None:
    for choice in field.metadata["key"].choices:
        taken = getattr(RunConfig.from_values({**BESIDE.get(field.name, {}), field.name: choice}), field.name)
        assert taken in (choice, (choice,))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"devices": 5, "sampled": 6},
            "sampled = 6: more than devices = 5; sample at most as many as there are",
        ),
        ({"min_rank": 17, "fixed_rank": 17}, "min_rank = 17: must not exceed max_rank = 16"),
        ({"fixed_rank": 2}, "fixed_rank = 2: must lie between min_rank = 4 and max_rank = 16"),
        ({"max_rank": 6}, "fixed_rank = 8: must lie between min_rank = 4 and max_rank = 6"),
        ({"warmup_ratio": 0.25}, "warmup_ratio = 0.25: must be below ramp_ratio = 0.25"),
        (
            {"method": "flora", "target_sparsity": 0.5},
            "target_sparsity = 0.5: with fold = 'all' it must be 0.0; or leave fold at 'none'",
        ),
        (
            {"method": "flora", "policy": "time-model"},
            "policy = 'time-model': with fold = 'all' it must be fixed or random or tertile; or leave fold at 'none'",
        ),
        (
            {"method": "fedex-lora", "policy": "tertile"},
            "policy = 'tertile': with fold = 'residual' it must be fixed; or leave fold at 'none'",
        ),
        (
            {"method": "fedex-lora", "aggregation": "zero-pad"},
            "aggregation = 'zero-pad': with fold = 'residual' it must be coordinate; or leave fold at 'none'",
        ),
        (
            {"method": "fedsa-lora", "aggregation": "product"},
            "aggregation = 'product': with trained_factors = 'local-b' it must be coordinate or zero-pad; "
            "or leave trained_factors at 'both'",
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], expected: str) -> None:
    assert refusal(**values) == expected


@pytest.mark.parametrize(("iterations", "interval", "cuts"), [(20, 20, 1), (20, 5, 4), (20, 7, 2), (5, 20, 1)])
def test_cuts_leave_iterations_to_recover(iterations: int, interval: int, cuts: int) -> None:
    assert RunConfig(local_iterations=iterations, prune_interval=interval).cuts_per_round == cuts


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"policy": "fedspine"}, True),
        ({"policy": "time-model"}, True),
        ({"policy": "s-ucb"}, True),
        ({"policy": "s-ucb", "local_work": "equal"}, False),
        ({"policy": "fedspine", "probe": "never"}, False),
    ],
)
def test_only_what_predicts_times_probes(values: dict[str, Any], expected: bool) -> None:
    assert RunConfig.from_values(values).uses_probe is expected


def test_a_roll_call_is_for_what_asks_for_times() -> None:
    assert RunConfig(sampling="uniform").uses_roll_call
    assert not RunConfig(roll_call=False).uses_roll_call
    assert RunConfig(policy="fixed").uses_roll_call
    assert RunConfig(policy="fixed", sampling="uniform").uses_roll_call
    assert not RunConfig(policy="fixed", sampling="uniform", local_work="equal").uses_roll_call
    assert RunConfig(devices=2000).uses_roll_call
    assert not RunConfig(devices=2001).uses_roll_call


@pytest.mark.parametrize(("rows", "share"), [(0, 1.0), (2, 0.25), (8, 1.0), (9, 1.0)])
def test_a_probe_times_a_part_of_a_batch(rows: int, share: float) -> None:
    assert RunConfig(batch_size=8, timed_examples=rows).probe_share == share


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value) == f"configuration file {path} does not exist"


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path, {})
    assert str(caught.value).startswith(f"configuration file {tmp_path} cannot be read: ")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"rounds = 3 # \xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"configuration file {path} cannot be read: ")


@pytest.mark.parametrize("text", ["rounds = ", "rounds 3", "rounds = 3\nrounds = 4\n", "model = bert"])
def test_broken_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"configuration file {path} is not valid TOML: ")
    assert "(at " in str(caught.value)


def test_a_run_that_was_too_early_for_a_key_goes_on_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rounds = 7\n", encoding="utf-8")
    assert saved_config(tmp_path) == RunConfig.from_values({"rounds": 7, "rate_schedule": "constant"})
    (tmp_path / "config.toml").write_text('rate_schedule = "cosine"\n', encoding="utf-8")
    assert saved_config(tmp_path).rate_schedule == "cosine"


def test_table_in_a_file_is_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[training]\nrounds = 3\n")
    with pytest.raises(ConfigError, match="unknown key 'training'"):
        load_config(path, {})


def test_wrong_value_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('rounds = "many"\n')
    with pytest.raises(ConfigError, match=r"^rounds = 'many': must be a whole number, such as 12$"):
        load_config(path, {})
