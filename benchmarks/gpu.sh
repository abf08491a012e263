#!/usr/bin/env bash
# Tests and records of a CUDA machine, in one command of nine minutes at most.
#
#     benchmarks/gpu.sh            # replaces the CUDA tables in benchmarks/records/
#     benchmarks/gpu.sh FOLDER     # writes them there
#
# PYTHON chooses the interpreter: .venv/bin/python, else python3.  What the time does not suffice for is named.
# Exit code: 0, all was done; 1, something failed or was cut off; 2, there is no CUDA device.
set -u
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
limit=540 failed=0
where=(--record)
[ $# -gt 0 ] && where=(--out "$1")

"$PYTHON" -c '
import sys, torch, util
torch.cuda.is_available() or sys.exit(f"gpu.sh: needs a CUDA device, {util.why_no_cuda()}")' || exit 2

run() {
    local left=$((limit - SECONDS))
    echo "== $* ($left s left)"
    if [ "$left" -lt 10 ] || ! PYTHONUNBUFFERED=1 timeout --kill-after=5 "$((left - 5))" "$PYTHON" -m "$@"; then
        echo "gpu.sh: failed or cut off: $*" >&2
        failed=1
    fi
}

[ -f tests/test_cuda.py ] && run pytest tests/test_cuda.py
run benchmarks.speed step --model fnf res18 "${where[@]}"
precisions=(fp32 tf32 bf16)
run benchmarks.speed epoch --model fnf res18 --precision "${precisions[@]}" "${where[@]}"
run benchmarks.memory "${where[@]}"
exit "$failed"
