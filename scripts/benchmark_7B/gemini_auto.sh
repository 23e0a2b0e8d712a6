#!/usr/bin/env bash
# 7B under gemini_auto: as gemini.sh, with the optimizer state always in host memory, and of the
# weights as much as the GPUs have no room for.

set -euo pipefail
# shellcheck source=scripts/benchmark_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark_common.sh"

benchmark -c 7b -p gemini_auto -x bf16 -b 16 --recompute full "$@"
