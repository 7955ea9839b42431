#!/usr/bin/env bash
# Real engines beside this process: `transformers serve`, a vLLM server and vLLM in its own process,
# on the embedded default model in float32. Each is held to the engines' contract, and where
# $ROBUSTFT_DATA (../shared/data if unset) has real records, to the verdicts on 100 of them and to
# the scores of given answers that the transformers engine finds.
#
#   run_real_engines.sh              transformers serve ([server] and transformers[serving] needed)
#   run_real_engines.sh VLLM_PYTHON  and vLLM, in an environment of its own that has robustft[test]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
data=${ROBUSTFT_DATA:-../shared/data}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
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

# -P: the installed robustft, not the sources of this folder, which lack the compiled part.
contract() { OMP_NUM_THREADS=1 "$1" -P -m pytest -q -m integration tests/test_engine_contract.py -k "$2"; }

robustft() { # PYTHON OPTION...
    "$1" -P -m robustft "${@:2}" --dtype float32 >"$log/last" 2>&1 || { cat "$log/last"; exit 1; }
}

verdicts() { # PYTHON NAME OPTION...: of 100 records, into $log/NAME
    [ -d "$data/fpb" ] || return 0
    echo "100 records: $2"
    robustft "$1" clean "$data/fpb/noisy50.csv" --limit 100 --detector paper \
        --rounds 1 --reasoning-tokens 32 --out "$log/$2" "${@:3}"
}

scores() { # PYTHON NAME OPTION...: of letters and of worked solutions, into $log/NAME.*
    [ ! -d "$data/fpb" ] || for given in letters solutions; do
        robustft "$1" score "$log/$given.jsonl" --out "$log/$2.$given" "${@:3}"
    done
}

compare() { # REFERENCE OTHER
    [ -d "$data/fpb" ] || { echo "$2: no real records at $data, nothing compared" && return; }
    echo "$2 beside $1"
    "$python" tests/integrations/compare_engines.py "$log/$1/verdicts.jsonl" "$log/$2/verdicts.jsonl"
    [ ! -e "$log/$2.letters" ] || for given in letters solutions; do
        "$python" tests/integrations/compare_engines.py "$log/$1.$given" "$log/$2.$given"
    done
}

[ ! -d "$data/fpb" ] || "$python" - "$data" "$log" <<'PYTHON'
import csv, itertools, json, sys
from pathlib import Path

data, log = map(Path, sys.argv[1:])
with (data / "fpb/noisy50.csv").open(newline="") as file:
    letters = [(row["question"], row["answer"]) for row in itertools.islice(csv.DictReader(file), 100)]
with (data / "gsm8k_solutions/solutions.jsonl").open() as file:
    worked = [json.loads(line) for line in itertools.islice(file, 40)]
solutions = [(row["question"], row["ground_truth"]) for row in worked]
for name, pairs in (("letters", letters), ("solutions", solutions)):
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (log / f"{name}.jsonl").write_text("\n".join(lines))
PYTHON

# A server without log-probabilities: answers are read from text, and nothing ranks them. The
# checker is left out: this process reads its yes or no from probabilities whatever --choice says,
# and in text this small model says neither.
text=(--choice generate --without selection --without checker)
verdicts "$python" transformers-text "${text[@]}"
port=$(free_port)
"$python" -m transformers.cli.transformers serve "$model" --device cpu --dtype float32 \
    --host 127.0.0.1 --port "$port" >"$log/serve" 2>&1 &
servers+=($!)
await "http://127.0.0.1:$port/health" "$log/serve"
ROBUSTFT_TRANSFORMERS_SERVE=http://127.0.0.1:$port/v1 ROBUSTFT_SERVED_MODEL=$model \
    contract "$python" transformers-serve
verdicts "$python" transformers-serve "${text[@]}" \
    --engine openai --base-url "http://127.0.0.1:$port/v1" --model "$model"
kill "${servers[-1]}" && wait "${servers[-1]}" 2>/dev/null || true
compare transformers-text transformers-serve

[ $# -gt 0 ] || exit 0
verdicts "$python" transformers
scores "$python" transformers
port=$(free_port)
"$1" -m vllm.entrypoints.openai.api_server --model "$model" --dtype float32 --max-model-len 2048 \
    --enforce-eager --host 127.0.0.1 --port "$port" >"$log/vllm" 2>&1 &
servers+=($!)
await "http://127.0.0.1:$port/v1/models" "$log/vllm"
ROBUSTFT_VLLM_SERVER=http://127.0.0.1:$port/v1 contract "$python" vllm-server
served=(--engine openai --base-url "http://127.0.0.1:$port/v1" --tokenizer "$model")
verdicts "$python" vllm-server "${served[@]}"
scores "$python" vllm-server "${served[@]}"
kill "${servers[-1]}" && wait "${servers[-1]}" 2>/dev/null || true
compare transformers vllm-server

contract "$1" "vllm and not server"
verdicts "$1" vllm-offline --engine vllm
scores "$1" vllm-offline --engine vllm
compare transformers vllm-offline
