#!/usr/bin/env bash
# 7B under zero2: whole weights on every GPU, gradients and optimizer state shared out.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 7b -p zero2 -x bf16 -b 16 --recompute full "$@"
