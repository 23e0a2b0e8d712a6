#!/usr/bin/env bash
# 7B in three dimensions: layers split over 2 GPUs, 2 pipeline stages, the rest data parallel.
# PP_STYLE=interleaved (default) or 1f1b; NUM_MODEL_CHUNKS=2. Processes: a multiple of 4.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark_pipeline -c 7b -p hybrid_parallel --tp 2 --pp 2 --microbatch_size 2 \
    -x bf16 -b 16 --recompute full "$@"
