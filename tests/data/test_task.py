"""Tasks from files, folders, the hub's loader and the grammar: what is found, and what is refused with which words."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedspine.config import RunConfig
from fedspine.data.embedded import embedded_task_frames
from fedspine.data.task import SUFFIXES, TextTask, _from_hub, load_task
from fedspine.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
TRAIN = pd.DataFrame({"text": [f"text number {row}" for row in range(12)], "label": ["cat", "dog", "ant"] * 4})
DEV = pd.DataFrame({"text": [f"held out {row}" for row in range(6)], "label": ["dog", "ant", "cat"] * 2})


def config(data: Path | str, **values: Any) -> RunConfig:
    return RunConfig.from_values({"data": str(data), "devices": 2, "sampled": 1, **values})


def write(frame: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def folder(path: Path, train: pd.DataFrame = TRAIN, dev: pd.DataFrame = DEV, suffix: str = ".tsv") -> Path:
    write(train, path / f"train{suffix}")
    write(dev, path / f"dev{suffix}")
    return path


def labels(task: TextTask, frame: pd.DataFrame) -> list[str]:
    """Every row's class by name."""
    return [task.classes[index] for index in frame["label"]]


def refusal(of: RunConfig) -> str:
    with pytest.raises(DataError) as caught:
        load_task(of)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_ending_gives_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = load_task(config(folder(tmp_path / "animals", suffix=suffix)))
    assert task.name == "animals"
    assert task.classes == ("ant", "cat", "dog")
    for frame, source in ((task.train, TRAIN), (task.test, DEV)):
        assert frame["text"].tolist() == source["text"].tolist()
        assert labels(task, frame) == source["label"].tolist()
        assert frame["label"].dtype == "int64"
        assert "text_pair" not in frame


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("test", ["dev", "validation", "val", "valid", "test"])
def test_files_are_found_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    write(TRAIN, tmp_path / f"{train}.csv")
    write(DEV, tmp_path / f"{test}.jsonl")
    task = load_task(config(tmp_path))
    assert (len(task.train), len(task.test)) == (len(TRAIN), len(DEV))


def test_evaluation_file_without_labels_is_passed_over(tmp_path: Path) -> None:
    write(TRAIN, tmp_path / "train.tsv")
    write(DEV[["text"]].head(3), tmp_path / "dev.tsv")
    write(DEV, tmp_path / "test.tsv")
    assert len(load_task(config(tmp_path)).test) == len(DEV)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_single_file_is_split_once_by_seed(tmp_path: Path, suffix: str) -> None:
    rows = pd.DataFrame({"text": [f"row {row}" for row in range(50)], "label": [row % 2 for row in range(50)]})
    path = write(rows, tmp_path / f"rows{suffix}")
    task, again, other = (load_task(config(path, seed=seed)) for seed in (3, 3, 4))
    assert (len(task.train), len(task.test)) == (45, 5)
    assert sorted([*task.train["text"], *task.test["text"]]) == sorted(rows["text"])
    assert task.train.equals(again.train)
    assert task.test.equals(again.test)
    assert set(task.test["text"]) != set(other.test["text"])
    assert task.train.index.tolist() == list(range(45))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *(("text", label) for label in ("labels", "intent", "class", "category", "target", "sentiment", "coarse")),
        *((text, "label") for text in ("sentence", "utterance", "review", "content", "question", "premise")),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path: Path, text: str, label: str) -> None:
    names = {"text": text, "label": label}
    task = load_task(config(folder(tmp_path, TRAIN.rename(columns=names), DEV.rename(columns=names))))
    assert task.train["text"].tolist() == TRAIN["text"].tolist()
    assert labels(task, task.test) == DEV["label"].tolist()
    assert "text_pair" not in task.train


def test_named_columns_win_over_the_usual_ones(tmp_path: Path) -> None:
    """Columns of the usual names that were not chosen must not reach the tokenizer or the loss."""
    extra = {"wanted": lambda frame: frame["text"] + " !", "grade": lambda frame: frame["label"].str.upper()}
    decoys = {"text_pair": "decoy", "sentence": "decoy"}
    train, dev = (frame.assign(**extra, **decoys) for frame in (TRAIN, DEV))
    task = load_task(config(folder(tmp_path, train, dev), text_column="wanted", label_column="grade"))
    assert task.classes == ("ANT", "CAT", "DOG")
    assert task.train["text"].tolist() == train["wanted"].tolist()
    assert labels(task, task.test) == dev["grade"].tolist()
    assert "text_pair" not in task.train


def test_other_columns_of_the_source_stay(tmp_path: Path) -> None:
    train = TRAIN.assign(writer=[f"person {row % 3}" for row in range(len(TRAIN))])
    assert load_task(config(folder(tmp_path, train))).train["writer"].tolist() == train["writer"].tolist()


@pytest.mark.parametrize(
    ("first", "second"),
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question", "question2")],
)
def test_sentence_pairs_are_found(tmp_path: Path, first: str, second: str) -> None:
    train, dev = (
        pd.DataFrame({first: frame["text"], second: "other " + frame["text"], "label": frame["label"]})
        for frame in (TRAIN, DEV)
    )
    task = load_task(config(folder(tmp_path, train, dev)))
    assert task.train["text"].tolist() == train[first].tolist()
    assert task.train["text_pair"].tolist() == train[second].tolist()
    assert task.test["text_pair"].tolist() == dev[second].tolist()


def test_sentence_pairs_are_named(tmp_path: Path) -> None:
    train, dev = (frame.assign(reply="other " + frame["text"], sentence1="decoy") for frame in (TRAIN, DEV))
    task = load_task(config(folder(tmp_path, train, dev), text_column="text", text_pair_column="reply"))
    assert task.train["text"].tolist() == train["text"].tolist()
    assert task.train["text_pair"].tolist() == train["reply"].tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_as_labels_are_ordered_as_numbers(tmp_path: Path, suffix: str) -> None:
    numbers = [2, 10, -1]
    train = TRAIN.assign(label=numbers * 4)
    dev = DEV.assign(label=[10, -1, 2] * 2)
    task = load_task(config(folder(tmp_path, train, dev, suffix)))
    assert task.classes == ("-1", "2", "10")
    assert labels(task, task.train) == [str(number) for number in train["label"]]
    assert labels(task, task.test) == [str(number) for number in dev["label"]]


def test_words_that_other_readers_take_for_missing_are_texts_and_labels(tmp_path: Path) -> None:
    train = pd.DataFrame({"text": ["None", "NA", "null", 'a "quote', "nan", "b"], "label": ["NA", "None"] * 3})
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{k}\n" for t, k in train.to_numpy()))
    write(train, tmp_path / "dev.csv")
    task = load_task(config(tmp_path))
    assert task.classes == ("NA", "None")
    assert task.train["text"].tolist() == task.test["text"].tolist() == train["text"].tolist()


def test_eval_examples_draws_rows_once_by_seed(tmp_path: Path) -> None:
    dev = pd.concat([DEV.assign(text=DEV["text"] + f" {copy}") for copy in range(10)])
    path = folder(tmp_path, dev=dev)
    full, some, again, other = (
        load_task(config(path, seed=seed, eval_examples=count)).test
        for seed, count in ((1, 0), (1, 20), (1, 20), (2, 20))
    )
    assert (len(full), len(some)) == (60, 20)
    assert some.equals(again)
    assert some["text"].tolist() != other["text"].tolist()
    assert set(some["text"]) <= set(full["text"])
    assert len(set(some["text"])) == 20
    assert len(load_task(config(path, eval_examples=1000)).test) == 60


def hub_folder(path: Path, train: pd.DataFrame = TRAIN, **splits: pd.DataFrame) -> Path:
    """A data set as a clone from the hub lies on disk."""
    for name, frame in {"train": train, **splits}.items():
        write(frame, path / "data" / f"{name}-00000-of-00001.parquet")
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, a cache of its own, and `tmp_path` as the working directory."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("offline")
def test_hub_loader_takes_train_and_validation(tmp_path: Path) -> None:
    hub_folder(tmp_path / "animals", validation=DEV, test=DEV.head(2).assign(label="hidden"))
    train, test = _from_hub(config("animals"))
    assert train["text"].tolist() == TRAIN["text"].tolist()
    assert test["label"].tolist() == DEV["label"].tolist()


@pytest.mark.usefixtures("offline")
def test_hub_loader_names_the_splits_that_it_has(tmp_path: Path) -> None:
    hub_folder(tmp_path / "animals")
    with pytest.raises(DataError, match=r"^data = 'animals': it has splits train; train and validation are needed$"):
        _from_hub(config("animals"))


@pytest.mark.usefixtures("offline")
def test_hub_name_that_cannot_be_had_offline() -> None:
    message = refusal(config("nobody/no-such-set"))
    assert message.startswith(
        "data = 'nobody/no-such-set': no such file or folder, and it cannot be loaded from the hub"
    )
    assert "Couldn't reach" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent-folder", "absent.tsv", "some/absent.parquet"])
def test_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    assert refusal(config(name)) == f"data = '{name}': there is no such file or folder"


@pytest.mark.parametrize(("there", "what", "names"), [("dev", "training", "train"), ("train", "evaluation", "dev")])
def test_folder_without_a_file_names_what_it_looks_for(tmp_path: Path, there: str, what: str, names: str) -> None:
    write(TRAIN, tmp_path / f"{there}.tsv")
    message = refusal(config(tmp_path))
    assert message.startswith(f"data = '{tmp_path}': no {what} file; expected one of {names}")
    assert ", ".join(SUFFIXES) in message


def test_unknown_ending(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_text("text,label")
    assert refusal(config(path)) == f"data = '{path}': unknown ending '.xlsx'; use one of {', '.join(SUFFIXES)}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"no parquet"),
        ("rows.json", b'[{"text": "a"'),
        ("rows.json", b'"text"'),
        ("rows.jsonl", b"text,label\n"),
        ("rows.csv", b'text,label\n"never closed,good\n'),
        ("rows.csv", b""),
        ("rows.tsv", b"text\tlabel\n\xff\xfe\x9d\tgood\n"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(config(path))
    assert message.startswith(f"data = '{path}' cannot be read: ")
    assert len(message) > len(f"data = '{path}' cannot be read: ")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "content"), [("rows.tsv", "text\tlabel\n"), ("rows.json", "[]")])
def test_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refusal(config(path)) == f"data = '{path}': it holds no rows"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"label_column": "verdict"}, "no column 'verdict'; it has text, label. Name it with label_column"),
        ({"text_column": "body"}, "no column 'body'; it has text, label. Name it with text_column"),
        ({"text_pair_column": "reply"}, "no column 'reply'; it has text, label. Name it with text_pair_column"),
    ],
)
def test_missing_named_column(tmp_path: Path, values: dict[str, str], expected: str) -> None:
    assert refusal(config(folder(tmp_path), **values)) == f"data = '{tmp_path}': {expected}"


@pytest.mark.parametrize(
    ("column", "key", "usual"),
    [("text", "text_column", "text, sentence, sentence1"), ("label", "label_column", "label, labels, intent")],
)
def test_no_column_of_a_usual_name(tmp_path: Path, column: str, key: str, usual: str) -> None:
    train, dev = (frame.rename(columns={column: "strange"}) for frame in (TRAIN, DEV))
    message = refusal(config(folder(tmp_path, train, dev)))
    assert message.startswith(f"data = '{tmp_path}': no column named {usual}")
    assert "strange" in message
    assert message.endswith(f"Name it with {key}")


def test_evaluation_rows_without_the_column(tmp_path: Path) -> None:
    path = folder(tmp_path, dev=DEV.rename(columns={"text": "sentence"}))
    assert refusal(config(path)) == (
        f"data = '{path}': the evaluation rows have no column 'text'; they have sentence, label"
    )


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("nothing", ["", "   ", None])
@pytest.mark.parametrize("column", ["text", "label"])
def test_empty_text_or_label_names_its_row(tmp_path: Path, suffix: str, nothing: str | None, column: str) -> None:
    train = TRAIN.astype(object)
    train.loc[4, column] = nothing
    path = folder(tmp_path, train, suffix=suffix)
    assert refusal(config(path)) == f"data = '{path}': row 5 of the train rows has an empty '{column}'"


def test_empty_second_text_of_an_evaluation_row(tmp_path: Path) -> None:
    train, dev = (frame.rename(columns={"text": "premise"}).assign(hypothesis="so") for frame in (TRAIN, DEV))
    dev.loc[0, "hypothesis"] = ""
    path = folder(tmp_path, train, dev)
    assert refusal(config(path)) == f"data = '{path}': row 1 of the evaluation rows has an empty 'hypothesis'"


def test_one_class(tmp_path: Path) -> None:
    path = folder(tmp_path, TRAIN.assign(label="cat"))
    assert refusal(config(path)) == (
        f"data = '{path}': column 'label' has only one class, 'cat'; two or more are needed"
    )


def test_evaluation_label_that_training_lacks(tmp_path: Path) -> None:
    dev = DEV.copy()
    dev.loc[2, "label"] = "zebra"
    message = refusal(config(folder(tmp_path, dev=dev)))
    assert message.startswith(f"data = '{tmp_path}': the evaluation rows have the label 'zebra'")
    assert "(3 classes: ant, cat, dog)" in message


def test_training_label_that_evaluation_lacks_is_fine(tmp_path: Path) -> None:
    task = load_task(config(folder(tmp_path, dev=DEV[DEV["label"] == "dog"])))
    assert labels(task, task.test) == ["dog", "dog"]


def test_more_devices_than_rows(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert len(load_task(config(path, devices=12)).train) == 12
    assert refusal(config(path, devices=13)) == (
        f"devices = 13: '{path}' has only 12 training rows; use at most one device per row"
    )


def test_file_of_one_row_is_refused(tmp_path: Path) -> None:
    assert refusal(config(write(TRAIN.head(1), tmp_path / "rows.tsv"))).startswith(f"data = '{tmp_path}/rows.tsv': ")


@pytest.mark.parametrize(("suffix", "mark"), [(".tsv", "\t"), (".csv", ",")])
def test_rows_longer_than_the_header_do_not_shift_columns(tmp_path: Path, suffix: str, mark: str) -> None:
    """Read as written or refused: both would do."""
    lines = [
        mark.join(["text", "label"]),
        *(mark.join([f"word {row}", f"class {row % 2}", f"note {row % 2}"]) for row in range(20)),
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}{suffix}").write_text("\n".join(lines) + "\n")
    with contextlib.suppress(DataError):
        assert load_task(config(tmp_path)).train["text"].tolist() == [f"word {row}" for row in range(20)]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl"])
def test_texts_and_labels_that_look_like_numbers_stay_as_written(tmp_path: Path, suffix: str) -> None:
    train = pd.DataFrame({"text": ["007", "1e3", "5.50"], "label": ["01", "02", "other"]})
    task = load_task(config(folder(tmp_path, train, train.head(2), suffix)))
    assert task.classes == ("01", "02", "other")
    assert task.train["text"].tolist() == ["007", "1e3", "5.50"]


def test_empty_text_in_a_single_file_names_the_row_of_the_file(tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": [f"row {row}" for row in range(100)], "label": [row % 2 for row in range(100)]})
    for row in (90, 91, 92, 93):
        rows.loc[row, "text"] = ""
    message = refusal(config(write(rows, tmp_path / "rows.csv")))
    assert any(f"row {row + 1} " in message for row in (90, 91, 92, 93))


def test_single_file_keeps_every_class_in_training(tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": [f"row {row}" for row in range(40)], "label": [row % 2 for row in range(40)]})
    rows.loc[7, "label"] = 2
    path = write(rows, tmp_path / "rows.tsv")
    for seed in range(30):
        assert load_task(config(path, seed=seed)).classes == ("0", "1", "2")


def test_text_from_a_column_named_text_pair_has_no_second_text(tmp_path: Path) -> None:
    train, dev = (frame.rename(columns={"text": "text_pair"}) for frame in (TRAIN, DEV))
    assert "text_pair" not in load_task(config(folder(tmp_path, train, dev), text_column="text_pair")).train


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/rows.tsv"])
def test_impossible_path_is_refused(name: str) -> None:
    assert "no such file" in refusal(config(name))


@pytest.mark.parametrize("writers", [1, 7, 40])
def test_embedded_task_holds_its_contract(writers: int) -> None:
    classes, train, test = embedded_task_frames(5, writers)
    assert len(set(classes)) == len(classes) >= 3
    per_class = Counter(test["label"])
    assert set(per_class) == set(range(len(classes)))
    assert max(per_class.values()) - min(per_class.values()) <= 1
    assert train["writer"].nunique() == writers
    for _, rows in train.groupby("writer"):
        assert 10 <= len(rows) <= 10_000
        assert set(rows["label"]) == set(range(len(classes)))
    for frame in (train, test):
        assert {"text", "label", "writer"} <= set(frame.columns)
        words = frame["text"].str.split().str.len()
        assert words.min() >= 1
        assert words.max() <= 60


def test_embedded_task_is_drawn_by_seed() -> None:
    (_, *first), (_, *again), (_, *other) = (embedded_task_frames(seed, 4) for seed in (1, 1, 2))
    for left, same, different in zip(first, again, other, strict=True):
        assert left.equals(same)
        assert left["text"].tolist() != different["text"].tolist()


def test_embedded_task_has_a_writer_per_device() -> None:
    task = load_task(config("embedded", devices=5, eval_examples=30))
    assert task.name == "embedded"
    assert task.train["writer"].nunique() == 5
    assert len(task.test) == 30


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "held_out", "classes", "pair"),
    [
        ("sst2", 20000, 872, 2, False),
        ("mrpc", 3667, 408, 2, True),
        ("rte", 2490, 277, 2, True),
        ("qnli", 4200, 1000, 2, True),
        ("trec", 5452, 500, 6, False),
        ("clinc150", 15000, 3000, 150, False),
    ],
)
def test_public_data_loads_without_naming_columns(
    name: str, rows: int, held_out: int, classes: int, pair: bool
) -> None:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"../shared/data is absent: {name} was not read")
    task = load_task(config(path))
    assert (len(task.train), len(task.test), len(task.classes)) == (rows, held_out, classes)
    assert ("text_pair" in task.train) == ("text_pair" in task.test) == pair
    for frame in (task.train, task.test):
        assert (frame["text"].str.strip() != "").all()
        assert frame["label"].between(0, classes - 1).all()


def test_json_lines_may_hold_text_beyond_ascii(tmp_path: Path) -> None:
    lines = [{"text": f"übermäßig 🙂 {row}", "label": "gut" if row % 2 else "schlecht"} for row in range(4)]
    for name in ("train", "dev"):
        content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    assert load_task(config(tmp_path)).train["text"].tolist() == [line["text"] for line in lines]
