#!/usr/bin/env bash
# 70B under gemini: weights, gradients and optimizer state shared out among all GPUs.
# Out of memory? gemini_auto.sh keeps the optimizer state in the hosts' memory and is slower.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 70b -p gemini -x bf16 -b 2 --recompute full "$@"
