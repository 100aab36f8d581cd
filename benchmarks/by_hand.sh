#!/usr/bin/env bash
# The demo release by hand: the same tools from the command line, cold, one after the other.
#
# Usage: benchmarks/by_hand.sh OUTPUT_DIRECTORY
#
# Quantize with llm-compressor, serve the source with vLLM, evaluate it with lm-eval, stop; serve the
# candidate, evaluate it, stop. Nothing is compared or proven: that would come on top. The hand is a
# fair one: the environments that day0 built (with their bytecode), the questions, engine flags,
# seed and concurrency of `day0 release demo --recipe int8` on a CPU, a server that is asked for its
# health twice a second, and lm-eval's own data set cache, which the second evaluation finds filled.
# OMP_WAIT_POLICY is what the caller exports; day0 sets PASSIVE, which these tools' manuals do not.
#
# Leaves OUTPUT_DIRECTORY/steps.tsv: the name of each step and its wall time in seconds.
set -euo pipefail

output=$(mkdir -p "$1" && cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
environments=${DAY0_ENVIRONMENTS:-$HOME/.cache/day0/environments}
source_model=$root/conductor/demo/model
suite=$root/conductor/demo/suite
port=${PORT:-18000}

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HF_DATASETS_CACHE=$output/datasets-cache NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
server=

step() {
    local name=$1 started=$EPOCHREALTIME
    shift
    "$@"
    awk -v name="$name" -v from="$started" -v to="$EPOCHREALTIME" \
        'BEGIN { printf "%s\t%.1f\n", name, to - from }' | tee -a "$output/steps.tsv"
}

quantize() {
    "$environments/quantize/bin/python" - "$source_model" "$output/checkpoint" \
        >"$output/quantize.log" 2>&1 <<'PYTHON'
import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

model, output = sys.argv[1:]
recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
oneshot(model=model, recipe=recipe, output_dir=output)
PYTHON
}

serve() { # SIDE CHECKPOINT
    # The environment's own programs come first: its libraries call ninja and the like by name.
    PATH=$environments/serve-cpu/bin:$PATH VLLM_NO_USAGE_STATS=1 \
        VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
        "$environments/serve-cpu/bin/python" -m vllm.entrypoints.openai.api_server \
        --model "$2" --served-model-name "$1" --host 127.0.0.1 --port "$port" \
        --dtype auto --seed 0 --max-model-len 256 --enforce-eager --no-enable-log-requests \
        >"$output/server-$1.log" 2>&1 &
    server=$!
    until curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null; do
        kill -0 "$server" || { tail "$output/server-$1.log" >&2; exit 1; }
        sleep 0.5
    done
}

evaluate() { # SIDE
    # Task files name their data relative to their own directory.
    (cd "$suite" && "$environments/evaluate/bin/lm_eval" run --model local-completions \
        --model_args "model=$1,base_url=http://127.0.0.1:$port/v1/completions,tokenizer=$source_model,tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=16,max_retries=3,max_length=255,timeout=300,seed=0" \
        --tasks demo_addition,demo_sorting,demo_reverse,demo_majority,demo_compare,demo_facts \
        --include_path "$suite" --batch_size 1 --seed 0 \
        --output_path "$output/results-$1" --log_samples >"$output/evaluate-$1.log" 2>&1)
}

stop() {
    [ -z "$server" ] || { kill "$server" && wait "$server" || true; }
    server=
}
trap stop EXIT

rm -f "$output/steps.tsv"
step quantize quantize
step serve_source serve source "$source_model"
step evaluate_source evaluate source
step stop_source stop
step serve_candidate serve candidate "$output/checkpoint"
step evaluate_candidate evaluate candidate
step stop_candidate stop
