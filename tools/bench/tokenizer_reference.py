#!/usr/bin/env python3
"""What tokenizer_bench measures, with the PyPI package tokenizers on one thread.

    tokenizer_reference.py FOLDER TEXT [repetitions]
"""
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer  # noqa: E402

start = time.perf_counter()
tokenizer = Tokenizer.from_file(os.path.join(sys.argv[1], "tokenizer.json"))
print(f"loaded in {time.perf_counter() - start:.2f} s")
lines = open(sys.argv[2], encoding="utf-8").read().split("\n")[:-1]
size = sum(len(line.encode()) for line in lines)
for _ in range(int(sys.argv[3]) if len(sys.argv) > 3 else 3):
    rates = []
    start = time.perf_counter()
    tokens = sum(len(tokenizer.encode(line, add_special_tokens=False).ids) for line in lines)
    rates.append(size / (time.perf_counter() - start) / 1e6)
    start = time.perf_counter()
    assert tokens == sum(len(e.ids) for e in tokenizer.encode_batch_fast(lines, add_special_tokens=False))
    rates.append(size / (time.perf_counter() - start) / 1e6)
    print(f"{len(lines)} lines, {tokens} tokens, {rates[0]:.2f} MB/s one by one, {rates[1]:.2f} MB/s in a batch")
