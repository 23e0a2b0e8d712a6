"""Measure a training run: throughput, TFLOPS, memory, and where the time goes.

python benchmark.py -c tiny -p zero2                                one process, with or without GPU
torchrun --nproc_per_node 8 benchmark.py -c 7b -p zero2 -g -x bf16  one host
colossalai run --nproc_per_node 8 --hostfile hosts.txt benchmark.py ...   many hosts
"""

from functools import partial

from llama_lib import entry
from llama_lib.cli import run_script

main = partial(entry.main, "benchmark")

if __name__ == "__main__":
    run_script(main)
