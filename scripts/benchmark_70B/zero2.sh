#!/usr/bin/env bash
# 70B under zero2: whole weights (138 GB) on every GPU, gradients and optimizer state shared out.
# No GPU with less memory than that can run it: there, gemini.sh or 3d.sh.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p zero2 -x bf16 -b 1 --recompute full "$@"
