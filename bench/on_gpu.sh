#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes, without network: build, GPU
# tests, kernel benchmarks beside whatever peers are installed, one pipeline run.
#
#   bench/on_gpu.sh [OUT]      PYTHON=python3 names the interpreter; OUT (default: runs/on_gpu in the
#                              checkout) gets the CSV files, the logs and summary.txt
#
# Nothing is installed: the sources run from this checkout. Without a CUDA device the CPU cases run.
# A step that fails stops no other; the exit status is 1 where one failed, ran out of time or found
# none left.
set -uo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$checkout/runs/on_gpu}
python=${PYTHON:-python3}
{ mkdir -p "$out" && out=$(cd "$out" && pwd) && : >"$out/summary.txt"; } || {
    echo "$out cannot be written: name another folder, bench/on_gpu.sh OUT" >&2
    exit 1
}
cd "$checkout" || exit 1
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false

most=460 # seconds for everything; each step's own limit keeps it from taking the others'
failed=()
say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs at most so long, logs to NAME.log, says how it went.
step() {
    local name=$1 limit=$2 begin=$SECONDS left=$((most - SECONDS)) status
    shift 2
    if ((left < limit)); then limit=$left; fi
    if ((limit <= 0)); then
        failed+=("$name")
        : >"$out/$name.log" # an earlier run's results are not this one's
        say "$name: not run, $most s are over"
        return 1
    fi
    # What does not end when asked to (a driver call, a handler of its own) is ended.
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    ((status)) && failed+=("$name")
    if ((status == 0)); then
        say "$name: done in $((SECONDS - begin)) s"
    elif ((status == 124 || (status == 137 && SECONDS - begin >= limit))); then
        say "$name: stopped after $limit s, see $out/$name.log"
    else
        say "$name: FAILED ($status), $(tail -n 1 "$out/$name.log")"
    fi
    return $status
}

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || {
    say "$python cannot import torch: nothing to run"
    exit 1
}
"$python" - <<'EOF' | tee -a "$out/summary.txt"
import importlib.metadata as m, platform, torch
names = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl")
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions() if d.metadata["Name"]}
print("python", platform.python_version(), *(f"{n} {found[n]}" for n in names if n in found), sep="; ")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: CPU cases only")
EOF

if "$python" -c 'import robustft._core' 2>"$out/build.log"; then
    say "build: the C++ core is there"
else
    step build 110 "$python" bench/build_core.py ||
        say "build: no C++ core; the Triton kernels need none, CPU cases fall back to PyTorch"
fi

if [ "$device" = cuda ]; then
    if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
        workers=()
        "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
        step tests 120 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" \
            tests/test_token_stats_triton.py tests/test_answer_consistency_triton.py \
            tests/test_engine_transformers.py -k "not ahead_of_time"
        tail -n 1 "$out/tests.log" | tee -a "$out/summary.txt"
    else
        say "tests: not run (pytest or hypothesis is not installed)"
    fi
    step token-stats 90 "$python" bench/token_stats.py --out "$out/token_stats.csv"
    step token-gradients 60 "$python" bench/token_gradients.py --out "$out/token_gradients.csv"
    step linear-token-stats 100 "$python" bench/linear_token_stats.py \
        --out "$out/linear_token_stats.csv"
    step linear-token-gradients 110 "$python" bench/linear_token_gradients.py \
        --out "$out/linear_token_gradients.csv"
else
    step token-stats 70 "$python" bench/token_stats.py --quick --out "$out/token_stats.csv"
    step token-gradients 40 "$python" bench/token_gradients.py --quick \
        --out "$out/token_gradients.csv"
    step linear-token-stats 80 "$python" bench/linear_token_stats.py --quick \
        --out "$out/linear_token_stats.csv"
    step linear-token-gradients 60 "$python" bench/linear_token_gradients.py --quick \
        --out "$out/linear_token_gradients.csv"
fi
step consistency 40 "$python" bench/consistency.py --quick --out "$out/consistency.csv"

if "$python" -c 'from robustft.models import find_model; find_model(None)' >"$out/pipeline.log" 2>&1; then
    step pipeline 70 "$python" -m robustft demo --out "$out/demo"
else
    say "pipeline: not run (the embedded models are not installed: requirements-models.txt)"
fi

# Of the lines that begin with a case, those that say more than its name.
cases='(N=|(exact|token_f1|lcs|edit) K=)'
grep -hE "^($cases.*(: |  )|not run)" "$out"/*.log 2>/dev/null | sort -u | tee -a "$out/summary.txt"
say "took $SECONDS s; CSV files and logs in $out"
if ((${#failed[@]})); then
    say "failed: ${failed[*]}"
    exit 1
fi
