# shellcheck shell=bash
# What all benchmark scripts have in common; they source it and call `benchmark`, or for a pipeline
# `benchmark_pipeline`, once.
#
# Environment:
#   HOSTFILE=FILE      hosts to run on, one name or address a line; default: hosts.txt beside the
#                      script; HOSTFILE= (empty) or no such file: this host alone
#   NPROC=N            processes per host; default: its GPUs, or 1 on this host alone without any
#   MASTER_PORT=N      where the processes meet, on the first host; default: 29500 with a host file,
#                      else one that is free
#   OMP_NUM_THREADS=N  default: the cores of each host divided among its processes
#   PASS=NAME,...      more variables that the hosts of a file are given (docs/launch.md)
#
# Arguments go to benchmark.py behind the script's own; of an option given twice the last counts.
# Relative paths mean what they mean where you are.

readonly OWN_SCRIPT="${BASH_SOURCE[1]}"
OWN_FOLDER="$(realpath -s "$(dirname "$OWN_SCRIPT")")"
ROOT="$(realpath -s "$(dirname "${BASH_SOURCE[0]}")/..")"
readonly OWN_FOLDER ROOT

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
    local hostfile options=() processes="a process for each GPU (NPROC= asks for another number)"
    hostfile="$(find_hostfile)"
    if [[ -n "${NPROC-}" ]]; then
        if [[ ! "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
            fail "NPROC: got '$NPROC', expected the number of processes per host"
        fi
        processes="$NPROC process(es)"
        options+=(--nproc_per_node "$NPROC")
    fi
    if [[ -n "$hostfile" ]]; then
        say "the hosts of $hostfile, on each $processes"
        options+=(--hostfile "$hostfile")
    else
        say "this host alone, $processes; no HOSTFILE= and no hosts.txt beside the script"
    fi
    if [[ -n "${MASTER_PORT-}" ]]; then
        options+=(--master_port "$MASTER_PORT")
    fi
    if [[ -n "${PASS-}" ]]; then
        options+=(--pass "$PASS")
    fi
    exec bash "$ROOT/scripts/launch.sh" "${options[@]}" "$ROOT/benchmark.py" "$@"
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
    if [[ ! -f "$file" || ! -r "$file" ]]; then
        fail "host file $file: no such file; give HOSTFILE= one with a host name or address per line"
    fi
    realpath "$file"
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
