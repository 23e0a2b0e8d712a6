#!/usr/bin/env bash
# 70B under zero2: whole weights on every GPU, gradients and optimizer state shared out.
# By the plan it needs about 168,600 MB on each of 32 GPUs: a B200 has that, an H200 has not.
# On smaller GPUs gemini.sh or 3d.sh.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p zero2 -x bf16 -b 1 --recompute full "$@"
