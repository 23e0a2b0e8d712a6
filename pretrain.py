"""Pre-train a Llama with one of ColossalAI's Booster plugins.

python pretrain.py -d sample -c tiny                            one process, with or without GPU
torchrun --nproc_per_node 8 pretrain.py -p zero2 ...            one host
colossalai run --nproc_per_node 8 --hostfile hosts.txt pretrain.py -p gemini ...   many hosts
"""

from llama_lib.cli import run_script


def main(argv: list[str]) -> int:
    from llama_lib.config import parse_options

    options = parse_options("pretrain", argv)

    from llama_lib.launch import rank
    from llama_lib.preflight import preflight

    run = preflight(options)
    if options.report.dry_run:
        if rank() == 0:
            print("\n".join(run.notes + run.describe()))
        return 0

    from llama_lib.run import train

    return train(run)


if __name__ == "__main__":
    run_script(main)
