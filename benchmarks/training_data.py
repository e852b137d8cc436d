"""
Memory of a large data set: writes a LLaVA JSON, opens it as training does, reads records at random, prints what a
process holds.

    python benchmarks/training_data.py --records 665298
"""

import argparse
import json
import os
import random
import re
import tempfile
import time

import numpy as np

from mqt_llava.training.data import ConversationDataset, Source
from mqt_llava.training.records import JsonRecords


WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "square",
    "stands",
    "beside",
    "on",
    "under",
    "of",
    "and",
    "is",
    "there",
    "many",
    "picture",
    "shows",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_298, help="default: as many as llava_v1_5_mix665k")
    parser.add_argument("--reads", type=int, default=50_000, help="records read at random (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "data.json")
        write(path, args.records)
        before = memory()
        started = time.perf_counter()
        source = Source("data", JsonRecords(path))
        dataset = ConversationDataset([source], encode=lambda conversation: conversation)
        opened, indexed = time.perf_counter() - started, memory()
        for position in np.random.default_rng(0).integers(0, len(dataset), args.reads):
            source.records[int(dataset.position_of[position])]
        report(path, len(dataset), opened, before, indexed, memory())


def write(path: str, number: int) -> None:
    """Records of about 1.5 kB, as in the authors' second stage: several turns and an image."""
    generator = random.Random(0)
    with open(path, "w") as file:
        file.write("[")
        for i in range(number):
            turns = [
                {
                    "from": speaker,
                    "value": ("<image>\n" if turn == 0 else "") + " ".join(generator.choices(WORDS, k=30)),
                }
                for turn, speaker in enumerate(["human", "gpt"] * 4)
            ]
            record = {"id": f"{i:012d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": turns}
            file.write(("" if i == 0 else ",\n") + json.dumps(record))
        file.write("]")


def memory() -> dict[str, float]:
    """MB of this process: all that is resident, what is its own, and pages of files (which the system may drop)."""
    with open("/proc/self/status") as file:
        status = file.read()
    return {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "RssAnon", "RssFile")}


def report(path: str, number: int, opened: float, *moments: dict[str, float]) -> None:
    print(f"{number:,} records, {os.path.getsize(path) / 2**20:,.0f} MB, indexed in {opened:.1f} s")
    print("| | resident (MB) | own (MB) | pages of files (MB) |\n|---|---:|---:|---:|")
    for name, found in zip(("before", "after indexing", "after reading"), moments):
        print(f"| {name} | {found['VmRSS']:,.0f} | {found['RssAnon']:,.0f} | {found['RssFile']:,.0f} |")


if __name__ == "__main__":
    main()
