"""Pre-train a Llama with one of ColossalAI's Booster plugins.

python pretrain.py -d sample -c tiny                            one process, with or without GPU
torchrun --nproc_per_node 8 pretrain.py -p zero2 ...            one host
colossalai run --nproc_per_node 8 --hostfile hosts.txt pretrain.py -p gemini ...   many hosts
"""

from functools import partial

from llama_lib import entry
from llama_lib.cli import run_script

main = partial(entry.main, "pretrain")

if __name__ == "__main__":
    run_script(main)
