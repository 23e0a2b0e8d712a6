#!/usr/bin/env bash
# 70B under hybrid_parallel: each layer split over the 8 GPUs of a host, optimizer state shared out
# among the hosts. The number of processes must be a multiple of 8.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p hybrid_parallel --tp 8 -x bf16 -b 2 --recompute full "$@"
