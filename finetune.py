"""Fine-tune a Llama on instructions and chats with one of ColossalAI's Booster plugins.

python finetune.py --model_path FOLDER -d chats.jsonl                      one process
torchrun --nproc_per_node 8 finetune.py -p zero2 --model_path FOLDER ...   one host
colossalai run --nproc_per_node 8 --hostfile hosts.txt finetune.py ...     many hosts
"""

from functools import partial

from llama_lib import entry
from llama_lib.cli import run_script

main = partial(entry.main, "finetune")

if __name__ == "__main__":
    run_script(main)
