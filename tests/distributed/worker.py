"""torchrun worker.py FOLDER JOB...: runs jobs "check/layout/precision", one after the other.

Each adds one line {"job": ..., "report" or "error": ...} to FOLDER/report.jsonl, and has a folder
of its own beside it.
"""

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from llama_lib.cli import run_script
from llama_lib.launch import start_process_group
from tests.distributed.cases import MODEL


def main() -> None:
    start_process_group(seed=1)
    import torch.distributed as dist

    from llama_lib import chunked_loss
    from tests.distributed import (
        checks,
        finetune_checks,
        loading_checks,
        lora_checks,
        samples_checks,
        saving_checks,
        speed_checks,
    )

    known = (
        checks.CHECKS
        | finetune_checks.CHECKS
        | lora_checks.CHECKS
        | loading_checks.CHECKS
        | samples_checks.CHECKS
        | saving_checks.CHECKS
        | speed_checks.CHECKS
    )

    # Rows of a test have few tokens: pieces of 13, the last one smaller, in place of thousands.
    chunked_loss.CHUNK_ELEMENTS = chunked_loss.BLOCK_ELEMENTS = 13 * MODEL["vocab_size"]
    folder = Path(sys.argv[1])
    for job in sys.argv[2:]:
        check, layout, precision = job.split("/")
        begin = time.perf_counter()
        line: dict[str, Any] = {"job": job}
        try:
            own_folder = folder / job.replace("/", "-").replace(">", "-")
            line["report"] = known[check](layout, precision, own_folder)
        except Exception:  # every rank meets it, or the launcher's time limit ends the others
            line["error"] = traceback.format_exc()
        line["seconds"] = time.perf_counter() - begin
        if dist.get_rank() == 0 or "error" in line:
            with (folder / "report.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda _: main())
