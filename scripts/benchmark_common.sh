# shellcheck shell=bash
# What all benchmark scripts have in common; they source it and call `benchmark`, or for a pipeline
# `benchmark_pipeline`, once.
#
# Environment:
#   HOSTFILE=FILE      hosts to run on, one name or address a line; default: hosts.txt beside the
#                      script; HOSTFILE= (empty) or no such file: this host alone
#   NPROC=N            processes per host; default: the GPUs of this host; if none can be seen,
#                      1 on this host alone, 8 on the hosts of a file
#   MASTER_PORT=N      where the hosts of a file meet, on the first one (default 29500)
#   OMP_NUM_THREADS=N  default: the cores of this host divided among its processes
#   PASS=NAME,...      more variables that the hosts of a file are given; never secrets
#
# Arguments go to benchmark.py behind the script's own; of an option given twice the last counts.
# Relative paths mean what they mean where you are.

readonly OWN_SCRIPT="${BASH_SOURCE[1]}"
OWN_FOLDER="$(cd "$(dirname "$OWN_SCRIPT")" && pwd)"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly OWN_FOLDER ROOT

# Variables that the hosts of a file are given: the launcher writes every variable it has into a
# command line that a shell on each host reads (docs/launching.md), so it has few.
readonly PASSED_ON='^(PATH|HOME|USER|LOGNAME|LANG|LC_ALL|TMPDIR|CC|CXX|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH|PYTHONPATH|SSH_AUTH_SOCK|XDG_CACHE_HOME|MASTER_PORT|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|(CUDA|NVIDIA|NCCL|GLOO|FI|UCX|OFI|IBV|HF|OMP|MKL|KMP|TORCH|TORCHINDUCTOR|PYTORCH|TRITON)_[A-Z0-9_]+)$'
# Others that a run may miss on the hosts: they are named where they are set.
readonly KNOWN_TOOLS='^(LD_PRELOAD|PYTHONHASHSEED|PYTHONNOUSERSITE|ALL_PROXY|all_proxy|(HUGGING_FACE|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|WANDB|OPENBLAS|GOMP|MLX5|PSM2|PSM3|SHARP|OMPI|MPICH)_[A-Z0-9_]+)$'
# All users of a host can read its command lines.
readonly SECRET_NAME='(^|_)(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS)$'
readonly SECRET_VALUE='(://[^@]*:[^@]*@|^[^/@]*:[^/@]*@)'

say() {
    printf '%s: %s\n' "$(basename "$OWN_SCRIPT")" "$*"
}

# A mistake of the user, found before anything starts.
fail() {
    say "$*" >&2
    exit 2
}

# benchmark ARGUMENTS...: run benchmark.py with them on the hosts and processes asked for.
benchmark() {
    local hostfile
    hostfile="$(find_hostfile)"
    local hosts=1
    if [[ -n "$hostfile" ]]; then
        hosts="$(count_hosts "$hostfile")"
    fi
    local processes
    processes="$(count_processes "$hostfile")"
    use_own_packages
    # torchrun would set 1, which leaves an optimizer in host memory most of the cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(share_of_cores "$processes")}"
    if [[ -z "$hostfile" ]]; then
        say "this host alone, $processes process(es); no HOSTFILE= and no hosts.txt beside the script"
        exec torchrun --standalone --nproc_per_node "$processes" "$ROOT/benchmark.py" "$@"
    fi
    say "$hosts host(s) of $hostfile, $processes process(es) on each"
    # The launcher insists on a first word that ends in .py, so no closing quote there.
    local words=("$(printf '%q' "$ROOT/benchmark.py")") word
    for word in "$@"; do
        words+=("$(for_a_shell "$word")")
    done
    choose_variables
    exec env -i "${VARIABLES[@]}" colossalai run --nproc_per_node "$processes" \
        --master_port "${MASTER_PORT:-29500}" --hostfile "$hostfile" -- "${words[@]}"
}

# Set VARIABLES to the NAME=VALUE that the hosts are given; say which known ones they are not.
choose_variables() {
    local entry name value held=()
    check_pass
    VARIABLES=()
    while IFS= read -r -d '' entry; do
        name="${entry%%=*}"
        value="${entry#*=}"
        if [[ ! "$name" =~ $PASSED_ON && ",${PASS-}," != *",$name,"* ]]; then
            if [[ "$name" =~ $KNOWN_TOOLS ]]; then
                held+=("$name")
            fi
        elif [[ "$name" =~ $SECRET_NAME ]]; then
            held+=("$name")
        elif [[ "$value" =~ $SECRET_VALUE ]]; then
            say "$name is not passed on to the hosts: its value holds a password" >&2
        # Behind these characters the launcher's command line would mean something else.
        elif [[ "$value" == *[\$\`\"\\]* || "$value" == *$'\n'* ]]; then
            say "$name is not passed on to the hosts: its value holds a quote, \$ or the like" >&2
        else
            VARIABLES+=("$entry")
        fi
    done < <(env -0)
    if ((${#held[@]} > 0)); then
        say "not passed on to the hosts: ${held[*]}; PASS=NAME,... passes on what is no secret" >&2
    fi
}

# PASS= may name variables that are set and are no secrets.
check_pass() {
    local name names=()
    IFS=',' read -r -a names <<<"${PASS-}"
    for name in "${names[@]}"; do
        if [[ ! "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
            fail "PASS: got '$name', expected names of variables, separated by commas"
        elif [[ "$name" =~ $SECRET_NAME ]]; then
            fail "PASS: $name would stand on a command line of every host, where all its users can" \
                "read it; log in on each host instead (of Hugging Face's, HF_TOKEN_PATH= names a file)"
        elif [[ -z "${!name+given}" ]]; then
            fail "PASS: $name is not set"
        fi
    done
}

# The absolute path of the host file, or nothing.
find_hostfile() {
    local file="$OWN_FOLDER/hosts.txt"
    if [[ -n "${HOSTFILE+given}" ]]; then
        file="$HOSTFILE"
    elif [[ ! -e "$file" ]]; then
        return
    fi
    if [[ -z "$file" ]]; then
        return
    fi
    # The launcher itself would say so and end with 0, as if it had trained.
    if [[ ! -f "$file" || ! -r "$file" ]]; then
        fail "host file $file: no such file; give HOSTFILE= one with a host name or address per line"
    fi
    realpath "$file"
}

# How many hosts a file names. What the launcher takes silently for something else is refused.
count_hosts() {
    local hosts=() line host number=0
    while read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        if [[ -z "$line" ]]; then
            continue
        fi
        if [[ ! "$line" =~ ^[A-Za-z0-9._:-]+$ ]]; then
            fail "$1 line $number: got '$line', expected one host name or address and nothing else" \
                "(processes per host are given by NPROC=)"
        fi
        for host in "${hosts[@]}"; do
            if [[ "$host" == "$line" ]]; then
                fail "$1 line $number names $line a second time"
            fi
        done
        hosts+=("$line")
    done <"$1"
    if ((${#hosts[@]} == 0)); then
        fail "$1 names no host; expected a host name or address per line"
    fi
    echo "${#hosts[@]}"
}

# Processes per host; `$1` is the host file or empty.
count_processes() {
    local processes="${NPROC-}" gpus
    if [[ -z "$processes" ]]; then
        gpus="$(count_gpus)"
        if ((gpus > 0)); then
            processes="$gpus"
        elif [[ -z "$1" ]]; then
            processes=1
            say "no GPU can be seen: 1 process on the CPU; NPROC= asks for more" >&2
        else
            processes=8
            say "no GPU can be seen here: 8 processes on each host; NPROC= asks for another number" >&2
        fi
    elif [[ ! "$processes" =~ ^[1-9][0-9]*$ ]]; then
        fail "NPROC: got '$processes', expected the number of processes per host"
    fi
    echo "$processes"
}

count_gpus() {
    local gpus
    gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
    if ((gpus > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+given}" ]]; then
        gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)"
    fi
    echo "$gpus"
}

share_of_cores() {
    local cores
    cores="$(nproc)"
    echo $((cores > $1 ? cores / $1 : 1))
}

# The environment that `make install` made, unless another one is active.
use_own_packages() {
    if [[ -z "${VIRTUAL_ENV-}${CONDA_PREFIX-}" && -x "$ROOT/.venv/bin/torchrun" ]]; then
        export PATH="$ROOT/.venv/bin:$PATH"
    fi
    if ! command -v torchrun >/dev/null || ! command -v colossalai >/dev/null; then
        fail "torchrun and colossalai are not both on PATH; run 'make install' in $ROOT"
    fi
}

# `$1` as the shells of the hosts have to see it: the launcher joins all words with spaces.
for_a_shell() {
    if [[ "$1" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
        printf '%s' "$1"
    else
        printf "'%s'" "${1//\'/\'\\\'\'}"
    fi
}

# As `benchmark`, with PP_STYLE= (default: interleaved, or 1f1b) and NUM_MODEL_CHUNKS= as options.
# Interleaved, a stage holds that many parts of the model instead of one, and waits that many times
# less at both ends of a step.
benchmark_pipeline() {
    case "${PP_STYLE:=interleaved}" in
    interleaved) benchmark --pp_style interleaved --num_model_chunks "${NUM_MODEL_CHUNKS:-2}" "$@" ;;
    1f1b) benchmark --pp_style 1f1b "$@" ;;
    *) fail "PP_STYLE: got '$PP_STYLE', expected interleaved or 1f1b" ;;
    esac
}
