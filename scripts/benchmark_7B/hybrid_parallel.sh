#!/usr/bin/env bash
# 7B under hybrid_parallel: each layer split over 2 GPUs, optimizer state shared out among replicas.
# The number of processes must be a multiple of 2.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 7b -p hybrid_parallel --tp 2 -x bf16 -b 16 --recompute full "$@"
