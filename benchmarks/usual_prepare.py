"""The field's usual way from text to training rows: datasets.map twice, as run_clm of transformers.

Invariant: nothing of this project is imported, and the ids of a document are what the tokenizer
gives, BOS in front where it puts one, ended by EOS.
"""

import argparse
import json
import time
from itertools import chain

START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("data", "tokenizer", "cache_dir", "facts"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--num_proc", type=int, required=True)
    parser.add_argument("--block_size", type=int, required=True)
    arguments = parser.parse_args()

    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    assert tokenizer.is_fast, "the usual way is not to be slowed down by a Python tokenizer"
    eos = tokenizer.eos_token_id
    times = {"imports": time.perf_counter() - START}

    texts = load_dataset(
        "json", data_files=arguments.data, split="train", cache_dir=arguments.cache_dir
    )
    times["load_dataset"] = time.perf_counter() - START - sum(times.values())

    def tokenise(batch: dict) -> dict:
        encoded = tokenizer(batch["text"])
        return {
            "input_ids": [[*ids, eos] for ids in encoded["input_ids"]],
            "attention_mask": [[*mask, 1] for mask in encoded["attention_mask"]],
        }

    tokenised = texts.map(
        tokenise, batched=True, num_proc=arguments.num_proc, remove_columns=texts.column_names
    )
    times["map_tokenise"] = time.perf_counter() - START - sum(times.values())

    def group_texts(batch: dict) -> dict:
        joined = {key: list(chain.from_iterable(rows)) for key, rows in batch.items()}
        size = arguments.block_size
        end = len(joined["input_ids"]) // size * size
        blocks = {
            key: [ids[start : start + size] for start in range(0, end, size)]
            for key, ids in joined.items()
        }
        return {**blocks, "labels": [list(block) for block in blocks["input_ids"]]}

    blocks = tokenised.map(group_texts, batched=True, num_proc=arguments.num_proc)
    times["map_group"] = time.perf_counter() - START - sum(times.values())

    facts = {
        "stages": {name: round(seconds, 3) for name, seconds in times.items()},
        "tokenised": [file["filename"] for file in tokenised.cache_files],
        "blocks": [file["filename"] for file in blocks.cache_files],
        "num_blocks": len(blocks),
        "documents": len(tokenised),
    }
    with open(arguments.facts, "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main()
