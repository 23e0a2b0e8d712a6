"""What pretrain.py, finetune.py and benchmark.py do: read the options, check them, train.

Invariant: nothing heavy is imported before the options are known to be right.
"""


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

    from llama_lib.launch import rank
    from llama_lib.preflight import preflight

    run = preflight(options)
    run.notes += settled
    if options.report.check:
        if rank() == 0:
            print("\n".join(run.notes + run.describe()))
        return 0

    from llama_lib.run import train

    return train(run)
