#!/usr/bin/env bash
# Set up as scripts/train_qwenvl.sh does, plus the test tools, and run the tests: everything but the markers gpu and network.
# Hardware: 2 cores. Time: about 15 minutes, in as many processes as there are cores, four at most. Any pytest words pass through,
# in one process: bash scripts/test.sh -m "not slow" -k masking
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup.sh"

set_up dev
cd "$here/.."
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
(($#)) || set -- -n logical --maxprocesses 4 --dist loadfile
python -m pytest "$@"
