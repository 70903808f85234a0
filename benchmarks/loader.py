"""Reading batches from a folder of tokens: the time of a batch, and the memory of the process.

python benchmarks/loader.py [--gigabytes 10 | --folder DIR] [--batches N]
Makes a folder of random uint16 tokens in the temporary folder (TMPDIR moves it), and deletes it afterwards.
Prints one JSON line: median and 99th percentile of milliseconds a batch, rows read, seconds that opening took (the
whole folder is hashed), and the peak of resident memory in MB before and after.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time

import numpy as np

from jaxgpt.text import mixtures, token_folder
from jaxgpt.text.npy import GrowingArray
from jaxgpt.tokenizer import CharTokenizer

SHAPES = ((32, 1024), (12, 64))
VOCABULARY = 50_257


def make(folder: pathlib.Path, gigabytes: float) -> None:
    """A finished token folder of random tokens."""
    draw, block = np.random.default_rng(0), 1 << 24
    tokens = GrowingArray(folder / token_folder.TOKENS, np.dtype(np.uint16), 0)
    while (left := int(gigabytes * 1e9 / 2) - tokens.length) > 0:
        tokens.append(draw.integers(0, VOCABULARY, min(block, left), dtype=np.uint16))
    offset = tokens.finish()
    alphabet = "".join(map(chr, range(0x100, 0x100 + VOCABULARY)))  # a tokenizer of the right size: gpt2 trains on it
    CharTokenizer(alphabet).save(folder / token_folder.TOKENIZER)
    facts = {
        "format": token_folder.FORMAT,
        "dtype": "uint16",
        "tokens": tokens.length,
        "vocab_size": VOCABULARY,
        "sha256": token_folder.sha256_of(folder / token_folder.TOKENS, offset),
        "tokenizer_sha256": hashlib.sha256((folder / token_folder.TOKENIZER).read_bytes()).hexdigest(),
    }
    (folder / token_folder.DATASET).write_text(json.dumps(facts))


def peak_mb() -> float:
    """The most memory that this process ever had resident."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3), 1)


def measure(folder: str, batches: int) -> dict:
    """Read batches of both shapes from the training split."""
    began, before = time.perf_counter(), peak_mb()
    mixture = mixtures.parse_sources(folder)
    result = {"gigabytes": round(mixture.spans[0].folder.tokens * 2 / 1e9, 2)}
    result["open_s"] = round(time.perf_counter() - began, 1)
    rows = 0
    for batch_size, block_size in SHAPES:
        train, _ = mixtures.split(mixture, 0.9, block_size)

        def read(step, train=train, shape=(batch_size, block_size)):
            return mixtures.read_windows(train, 0, 0, step, *shape)

        times = []
        for step in range(batches):
            began = time.perf_counter()
            rows += len(read(step))
            times.append(1e3 * (time.perf_counter() - began))
        median, late = (round(float(np.percentile(times, p)), 3) for p in (50, 99))
        result[f"{batch_size}x{block_size}"] = {"median_ms": median, "p99_ms": late}
    return result | {"rows": rows, "peak_mb_before": before, "peak_mb": peak_mb()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder")
    parser.add_argument("--batches", type=int, default=2000)
    args = parser.parse_args()
    if args.folder:
        result = measure(args.folder, args.batches)
    else:
        with tempfile.TemporaryDirectory(prefix="jaxgpt-loader-") as folder:
            make(pathlib.Path(folder), args.gigabytes)
            result = measure(folder, args.batches)
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({**result, **machine, "command": " ".join(sys.argv)}))


if __name__ == "__main__":
    main()
