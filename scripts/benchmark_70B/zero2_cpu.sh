#!/usr/bin/env bash
# 70B under zero2_cpu: as zero2.sh, with the optimizer and its state in host memory.
# The weights (138 GB) are still whole on every GPU: with less memory, gemini_auto.sh.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p zero2_cpu -x bf16 -b 1 --recompute full "$@"
