#!/usr/bin/env bash
# 70B in three dimensions: layers split over 4 GPUs, 2 pipeline stages, the rest data parallel.
# PP_STYLE=interleaved (default) or 1f1b; NUM_MODEL_CHUNKS=2. Processes: a multiple of 8.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark_pipeline -c 70b -p hybrid_parallel --tp 4 --pp 2 --microbatch_size 1 \
    -x bf16 -b 8 --recompute full "$@"
