#!/usr/bin/env bash
# The engines' contract against real servers: `transformers serve`, a vLLM server and vLLM in this
# process, on the embedded default model in float32.
#
#   run_real_engines.sh              transformers serve ([server] and transformers[serving] needed)
#   run_real_engines.sh VLLM_PYTHON  and vLLM, in an environment of its own that has robustft[test]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
model=$("$python" -c 'from robustft.models import find_model; print(find_model(None).path)')
log=$(mktemp -d)
servers=()
trap 'for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done' EXIT

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

await() { # URL LOG: until the server answers, ten minutes at most
    for _ in $(seq 300); do
        curl --silent --fail --max-time 2 "$1" >/dev/null && return
        kill -0 "${servers[-1]}" 2>/dev/null || break
        sleep 2
    done
    echo "no server at $1:" && tail -n 20 "$2" && exit 1
}

port=$(free_port)
"$python" -m transformers.cli.transformers serve "$model" --device cpu --dtype float32 \
    --host 127.0.0.1 --port "$port" >"$log/serve" 2>&1 &
servers+=($!)
await "http://127.0.0.1:$port/health" "$log/serve"
ROBUSTFT_TRANSFORMERS_SERVE=http://127.0.0.1:$port/v1 ROBUSTFT_SERVED_MODEL=$model \
    "$python" -m pytest -q -m integration tests/test_engine_contract.py -k transformers-serve

[ $# -gt 0 ] || exit 0
port=$(free_port)
"$1" -m vllm.entrypoints.openai.api_server --model "$model" --dtype float32 --max-model-len 2048 \
    --enforce-eager --host 127.0.0.1 --port "$port" >"$log/vllm" 2>&1 &
servers+=($!)
await "http://127.0.0.1:$port/v1/models" "$log/vllm"
ROBUSTFT_VLLM_SERVER=http://127.0.0.1:$port/v1 \
    "$python" -m pytest -q -m integration tests/test_engine_contract.py -k vllm-server
kill "${servers[-1]}" && wait "${servers[-1]}" 2>/dev/null || true
"$1" -P -m pytest -q -m integration tests/test_engine_contract.py -k "vllm and not server"
