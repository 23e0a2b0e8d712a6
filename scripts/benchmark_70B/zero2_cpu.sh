#!/usr/bin/env bash
# 70B under zero2_cpu: as zero2.sh, with the optimizer and its state in host memory.
# By the plan it needs about 139,500 MB on each of 32 GPUs, and with --accumulation_steps about
# 143,600 MB: a B200 has that, an H200 leaves less to tensors. On smaller GPUs gemini_auto.sh.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p zero2_cpu -x bf16 -b 1 --recompute full "$@"
