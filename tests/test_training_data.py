import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import conversations, logged, picture, tiny_processor, trainer, write_llava

from mqt_llava.training import data as data_module
from mqt_llava.training.conversations import BadRecord, ConversationEncoder
from mqt_llava.training.data import ByLengthAndModality, ConversationDataset, SkipLog, Source, open_image
from mqt_llava.training.recipe import DataArguments
from mqt_llava.training.records import JsonRecords, conversation_of
from mqt_llava.training.sources import make_dataset


RECORDS = [
    {"id": i, "image": f"é{i}.png", "conversations": [{"from": "human", "value": "[,]\n" * (i % 5) + "日本"}]}
    for i in range(3000)
]


@pytest.fixture
def encode():
    return ConversationEncoder(tiny_processor())


@pytest.mark.parametrize("indent", [None, 2])
def test_records_of_a_json_list_are_read_one_at_a_time(tmp_path, indent, monkeypatch):
    monkeypatch.setattr("mqt_llava.training.records.CHUNK", 1000)  # records lie across the ends of chunks
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=False), encoding="utf-8")
    records = JsonRecords(tmp_path / "a.json")
    assert [records[i] for i in range(len(records))] == RECORDS
    assert records.index.with_image.all()


def test_records_of_json_lines_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    records = JsonRecords(tmp_path / "a.jsonl")
    assert [records[i] for i in range(len(records))] == RECORDS


@pytest.mark.parametrize("text", ["", '[{"a": 1}, {"b": ', '{"a": 1} what'])
def test_a_file_that_is_not_json_raises(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="JSON"):
        JsonRecords(tmp_path / "a.json")


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"x": 1}, "no conversation"),
        ([], "no conversation"),
        ({"conversations": "hello"}, "no conversation"),
        ({"messages": ["hello"]}, "no conversation"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "assistant", "content": ["a"]}]}, "empty answer"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no answer"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "  "}]}, "empty answer"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}, "empty answer"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "wrong number of <image>",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]},
            "wrong number of <image>",
        ),
        (
            {"image": "a", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]},
            "wrong number of <image>",
        ),
    ],
)
def test_a_bad_record_is_told_by_its_reason(record, reason):
    with pytest.raises(BadRecord) as error:
        conversation_of(record)
    assert error.value.reason == reason


def test_images_of_messages_that_name_none_come_before_the_first_question():
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    content = conversation_of({"messages": turns, "images": ["a", "b"]})["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]


def test_messages_may_have_one_image_by_itself():
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    assert conversation_of({"messages": turns, "image": "a"}) == conversation_of({"messages": turns, "images": ["a"]})


def test_a_missing_image_is_bad(tmp_path):
    with pytest.raises(BadRecord, match="image_folder"):
        open_image("nowhere.png", str(tmp_path))


def test_a_broken_image_is_bad(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    with pytest.raises(BadRecord, match="broken image"):
        open_image("a.png", str(tmp_path))


def test_a_huge_image_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "LARGEST_IMAGE", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(BadRecord, match="huge image"):
        open_image("a.png", str(tmp_path))


def folder_with_bad_records(tmp_path):
    path, images = write_llava(tmp_path, 6)
    os.remove(images / "1.png")
    (images / "2.png").write_bytes(b"no image")
    return Source("mine", JsonRecords(path), str(images))


def test_bad_records_are_skipped_and_reported(tmp_path, encode):
    log = SkipLog(str(tmp_path / "skipped.jsonl"))
    dataset = ConversationDataset([folder_with_bad_records(tmp_path)], encode, log)
    rows = [dataset[i] for i in range(len(dataset))]
    assert rows[1]["labels"].tolist() == rows[3]["labels"].tolist()  # the next good one stands in
    report = log.report(len(dataset))
    assert "Skipped 2 bad records" in report
    assert "mine#1" in report
    assert "33.3% of the data" in report


def test_few_bad_records_are_not_worth_a_warning(tmp_path, encode):
    log = SkipLog(str(tmp_path / "skipped.jsonl"))
    log.skip("a", BadRecord("empty answer"))
    assert "of the data" not in log.report(1000)


def test_bad_records_met_in_workers_are_counted_once(tmp_path, encode):
    log = SkipLog(str(tmp_path / "skipped.jsonl"))
    dataset = ConversationDataset([folder_with_bad_records(tmp_path)], encode, log)
    for _ in range(2):
        list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2))
    assert set(log.read()) == {"mine#1", "mine#2"}


def test_strict_data_stops_at_the_first_bad_record(tmp_path, encode):
    dataset = ConversationDataset([folder_with_bad_records(tmp_path)], encode, SkipLog(strict=True))
    dataset[0]
    with pytest.raises(ValueError, match="mine#1"):
        dataset[1]


def test_data_that_is_all_bad_raises(encode):
    dataset = ConversationDataset([Source("x", [{"x": 1}] * 5)], encode)
    with pytest.raises(ValueError, match="5 records in a row"):
        dataset[0]


@pytest.mark.parametrize("weight, expected", [(0.5, 5), (1.0, 10), (2.0, 20), (2.5, 25)])
def test_weights_say_how_often_a_record_is_seen(encode, weight, expected):
    dataset = ConversationDataset([Source("a", conversations(10), weight=weight)], encode)
    times = np.bincount(dataset.position_of, minlength=10)
    assert len(dataset) == expected
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_positive_raises(encode, weight):
    with pytest.raises(ValueError, match="`weight` must be positive"):
        ConversationDataset([Source("a", conversations(2), weight=weight)], encode)


def test_batches_are_of_one_kind_and_about_one_length():
    lengths = np.concatenate([np.arange(1, 41), -np.arange(1, 25)])
    order = list(ByLengthAndModality(lengths, 8))
    assert sorted(order) == list(range(64))
    for start in range(0, 64, 8):
        batch = lengths[order[start : start + 8]]
        assert len(set(np.sign(batch))) == 1
        assert np.ptp(np.abs(batch)) < 8


def test_the_order_by_length_is_another_in_each_epoch():
    sampler = ByLengthAndModality(np.arange(1, 65), 4, seed=1)
    first = list(sampler)
    assert first == list(ByLengthAndModality(np.arange(1, 65), 4, seed=1))
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_a_run_by_length_is_resumed_in_the_same_order(tmp_path, encode):
    dataset = ConversationDataset([Source("a", [*conversations(6), *conversations(4, images=0)])], encode)
    settings = {"examples": dataset, "group_by_modality_length": True, "max_steps": 8, "save_steps": 6}
    whole = trainer(tmp_path, save_strategy="steps", **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert logged(again, "loss") == logged(whole, "loss")


def columns():
    rows = conversations(6)
    return datasets.Dataset.from_dict(
        {
            "messages": [
                [{"role": m["role"], "content": m["content"][-1]["text"]} for m in r["messages"]] for r in rows
            ],
            "images": [r["images"] for r in rows],
        },
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_messages_and_images_give_the_same_rows(tmp_path, encode, streaming):
    columns().save_to_disk(tmp_path / "saved")
    arguments = DataArguments(streaming=streaming)
    dataset = make_dataset([str(tmp_path / "saved")], arguments, encode, SkipLog(), 0)
    rows = list(dataset) if streaming else [dataset[i] for i in range(len(dataset))]
    for row, example in zip(rows, conversations(6)):
        assert torch.equal(row["input_ids"], encode(example)["input_ids"])
        assert torch.equal(row["pixel_values"], encode(example)["pixel_values"])


def test_a_stream_leaves_bad_records_out(tmp_path, encode):
    path, images = write_llava(tmp_path, 6)
    os.remove(images / "1.png")
    log = SkipLog(str(tmp_path / "skipped.jsonl"))
    arguments = DataArguments(streaming=True, image_folder=str(images))
    assert len(list(make_dataset([str(path)], arguments, encode, log, 0))) == 5
    assert len(log.read()) == 1


def test_streams_mix_until_each_has_been_read(tmp_path, encode):
    path, images = write_llava(tmp_path, 6)
    sources = [{"path": str(path), "weight": 3, "image_folder": str(images)}, {"path": "builtin:tiny-eval"}]
    arguments = DataArguments(streaming=True)
    answers = list(make_dataset(sources, arguments, lambda c: c["messages"][-1]["content"][0]["text"], SkipLog(), 0))
    assert {"It is 0.", "It is 5.", "red"} <= set(answers)
    assert sum(answer.startswith("It is") for answer in answers) > 2 * 64


def test_workers_share_a_stream(tmp_path):
    path, images = write_llava(tmp_path, 7)
    arguments = DataArguments(streaming=True, image_folder=str(images))
    stream = make_dataset([str(path)], arguments, lambda c: c["messages"][-1]["content"][0]["text"], SkipLog(), 0)
    answers = list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(answers) == [f"It is {i}." for i in range(7)]


@pytest.mark.parametrize("source", [3, {"weight": 1}, {"path": "a", "wieght": 2}])
def test_a_source_that_makes_no_sense_raises(source):
    with pytest.raises(ValueError, match="A source in `data`"):
        make_dataset([source], DataArguments(), None, SkipLog(), 0)


def test_records_stay_on_disk(tmp_path):
    """A file of 30 MB; what indexing and reading it leave behind is a small part of that."""
    line = json.dumps({"id": "x" * 900, "conversations": [{"from": "gpt", "value": "y"}]}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 30000)
    code = (
        "import re, sys; from mqt_llava.training.records import JsonRecords\n"
        "def private(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = private(); records = JsonRecords(sys.argv[1]); [records[i] for i in range(0, len(records), 7)]\n"
        "print(len(records), private() - before)"
    )
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], capture_output=True, text=True, check=True)
    number, kilobytes = map(int, run.stdout.split())
    assert number == 30000
    assert kilobytes < 15_000
