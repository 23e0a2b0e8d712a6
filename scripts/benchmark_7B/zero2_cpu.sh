#!/usr/bin/env bash
# 7B under zero2_cpu: as zero2.sh, with the optimizer and its state in host memory.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 7b -p zero2_cpu -x bf16 -b 16 --recompute full "$@"
