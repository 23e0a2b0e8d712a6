#!/usr/bin/env bash
# Your folder of the project in the image of scripts/docker/Dockerfile, on all GPUs of this host:
#
#   bash scripts/docker/run.sh pretrain.py -c 7b -p zero2 -x bf16 -o runs/first
#   MOUNTS="/shared /data" bash scripts/docker/run.sh pretrain.py -d /data/text -o /shared/run ...
#
# The code is your folder's, the packages are the image's, and files belong to you. The project, the
# folder you are in and those of MOUNTS have inside the names they have outside; prepared data and
# what came from the hub stay in your ~/.cache.
#
# Environment:
#   IMAGE=NAME      default: llama
#   MOUNTS="A B"    more folders
#   NETWORK=NAME    default: Docker's; host for runs over many hosts; none where the data is on disk
#   HF_TOKEN, WANDB_API_KEY, CUDA_VISIBLE_DEVICES and all of NCCL_ and GLOO_ are handed on

set -euo pipefail

ROOT="$(realpath -s "$(dirname "${BASH_SOURCE[0]}")/../..")"
readonly ROOT

# `docker stop` and a host that shuts down leave the run time to save.
options=(--rm --init --stop-timeout 300 --ipc=host --ulimit memlock=-1 --ulimit stack=67108864)
options+=(--user "$(id -u):$(id -g)" --workdir "$PWD" --env "PYTHONPATH=$ROOT")
read -r -a folders <<<"${MOUNTS-}"
for folder in "$ROOT" "$PWD" "${folders[@]}"; do
    if [[ ! -d "$folder" ]]; then
        # Docker would make it, as root.
        printf 'run.sh: MOUNTS: no such folder: %s\n' "$folder" >&2
        exit 2
    fi
    folder="$(realpath -s "$folder")"
    options+=(--mount "type=bind,source=$folder,target=$folder")
done
cache="${XDG_CACHE_HOME:-$HOME/.cache}"
mkdir -p "$cache"
options+=(--mount "type=bind,source=$cache,target=/home/llama/.cache")
# No pipe: with pipefail its first part fails when `grep -q` has read enough.
if grep -q '^GPU ' <<<"$(nvidia-smi -L 2>/dev/null)"; then
    options+=(--gpus all)
else
    echo "run.sh: no GPU can be seen: running on the CPU" >&2
fi
if [[ -n "${NETWORK-}" ]]; then
    options+=(--network "$NETWORK")
fi
if [[ -t 0 && -t 1 ]]; then
    options+=(--interactive --tty)
fi
# By name alone: a value would stand on a command line that all users of this host can read.
while IFS= read -r name; do
    case "$name" in
    HF_TOKEN | WANDB_API_KEY | CUDA_VISIBLE_DEVICES | NCCL_* | GLOO_*)
        options+=(--env "$name")
        ;;
    esac
done < <(compgen -e)

exec docker run "${options[@]}" "${IMAGE:-llama}" "$@"
