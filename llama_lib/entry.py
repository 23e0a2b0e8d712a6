"""What pretrain.py, finetune.py and benchmark.py do: read the options, check them, train.

Invariant: nothing heavy is imported before the options are known to be right.
"""

import os


def main(script: str, argv: list[str]) -> int:
    """Run a training script on its command line; returns the exit code."""
    from llama_lib.config import parse_options

    options = parse_options(script, argv)
    if options.report.dry_run:
        from llama_lib.dry_run import dry_run

        return dry_run(options)

    settled = []
    if script == "benchmark":
        from llama_lib.run_benchmark import settle

        settled = settle(options)

    # The store of the processes warns of lost connections with C++ stacks; messages here say more.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from llama_lib.launch import rank
    from llama_lib.preflight import preflight

    if options.report.check:
        run = preflight(options)
        if rank() == 0:
            print("\n".join(run.notes + settled + run.describe()))
        return 0

    from llama_lib.watch.watchdog import watched

    # Before data are prepared: a host that is missing shows now, not in hours.
    with watched(options.watch.start_timeout) as watchdog:
        run = preflight(options)
        run.notes += settled
        from llama_lib.run import train

        return train(run, watchdog)
