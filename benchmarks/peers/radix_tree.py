"""CPU of ai-dynamo's router index; runs in ai-dynamo's own environment and prints one line of JSON.

python radix_tree.py TOKENS BLOCK_SIZE WORKERS PROMPTS
"""

from __future__ import annotations

import json
import random
import sys
import time

from dynamo._core import RadixTree

try:
    from dynamo.llm import compute_block_hash_for_seq as block_hashes
except ImportError:  # 0.3
    from dynamo.llm import compute_block_hash_for_seq_py as block_hashes

tokens, block_size, workers, prompts = map(int, sys.argv[1:])
draw = random.Random(1)
blocks = tokens // block_size


def cpu_us(work, values) -> list[float]:
    found = []
    for value in values:
        started = time.thread_time_ns()
        work(value)
        found.append((time.thread_time_ns() - started) / 1e3)
    return found


tree = RadixTree()
stored = [[draw.getrandbits(63) for _ in range(blocks)] for _ in range(prompts)]
events = []
for number, hashes in enumerate(stored):
    blocks_stored = [{"block_hash": draw.getrandbits(63), "tokens_hash": hash} for hash in hashes]
    data = {"stored": {"parent_hash": None, "blocks": blocks_stored}}
    events.append(json.dumps({"event_id": number, "data": data, "dp_rank": 0}).encode())
started = time.process_time_ns()
for number, event in enumerate(events):
    tree.apply_event(1 + number % workers, event)
    if number % 200 == 199:
        tree.find_matches([1])  # the tree works in a thread of its own: wait for it
tree.find_matches([1])
apply_us = (time.process_time_ns() - started) / 1e3 / (prompts * blocks)
asked = []
for _ in range(1000):
    known, end = draw.choice(stored), draw.randrange(blocks + 1)
    asked.append(known[:end] + [draw.getrandbits(63) for _ in range(blocks - end)])
started = time.process_time_ns()
for prompt in asked:
    tree.find_matches(prompt)
match_us = (time.process_time_ns() - started) / 1e3 / len(asked)
texts = [[draw.randrange(100_000) for _ in range(tokens)] for _ in range(200)]
hash_us = sorted(cpu_us(lambda text: block_hashes(text, block_size), texts))[100]
print(json.dumps({"hash_us": hash_us, "match_us": match_us, "apply_us_per_block": apply_us}))
