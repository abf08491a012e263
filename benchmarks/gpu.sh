#!/usr/bin/env bash
# Tests and records of a CUDA machine, in one command of nine minutes at most.
#
#     benchmarks/gpu.sh            # replaces the CUDA tables in benchmarks/records/
#     benchmarks/gpu.sh FOLDER     # writes them there
#
# The tests come first, then for FNF and Res18, in every precision: training step, inference and the convolutions
# of the official program alone; a whole epoch; and memory over depth.
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

# run SECONDS MODULE...: it may take so long, and no longer than what is left.
run() {
    local most=$1 left=$((limit - SECONDS - 5))
    shift
    [ "$most" -lt "$left" ] && left=$most
    echo "== $* (at most $left s)"
    if [ "$left" -lt 5 ] || ! PYTHONUNBUFFERED=1 timeout --kill-after=5 "$left" "$PYTHON" -m "$@"; then
        echo "gpu.sh: failed or cut off: $*" >&2
        failed=1
    fi
}

precisions=(fp32 tf32 bf16)
run 150 pytest tests/test_cuda.py -k "not cpu"
run 90 benchmarks.speed step --model fnf "${where[@]}"
run 120 benchmarks.speed step --model res18 --repeats 3 "${where[@]}"
run 250 benchmarks.speed epoch --model fnf res18 --precision "${precisions[@]}" "${where[@]}"
run 150 benchmarks.memory --maxStacks 16 "${where[@]}"
echo "gpu.sh: $SECONDS s"
exit "$failed"
