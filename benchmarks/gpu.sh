#!/usr/bin/env bash
# Everything that is measured on a GPU, in parts that can be run singly: JSON lines on stdout, the rest on stderr.
#   benchmarks/gpu.sh [--nanogpt DIR] [--text FILE] [--limit SECONDS] [--dry] PART... [-- --section.field VALUE ...]
# A PART is one of
#   tests      tests/devices/test_gpu.py
#   kernels    a step of GPT-2 124M with each attention kernel, rematerialisation and division of the loss
#   gpt2       its steps beside those of nanoGPT, compiled (needs --nanogpt)
#   generate   its generation beside that of nanoGPT, 1 and 16 texts (needs --nanogpt)
#   all        these four, configs/shakespeare.yaml and configs/lecture/scaled.yaml
# or a recipe, such as shakespeare, lecture/scaled or a YAML file, which is trained.
# --text is the corpus of the recipes (default: their own), --limit ends each part after so many seconds (default 300).
# The flags after -- change the recipe. --dry runs the parts on a CPU, with sizes so small that they take seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} nanogpt='' text='' limit=300 dry='' parts=() flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        --nanogpt) nanogpt=$2 && shift ;;
        --text) text=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --dry) dry=yes ;;
        --) shift && flags=("$@") && break ;;
        --*) echo "gpu.sh: unknown flag ($1): see the lines that open $0" >&2 && exit 2 ;;
        all) parts+=(tests kernels gpt2 generate shakespeare lecture/scaled) ;;
        *) parts+=("$1") ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \?//p}' "$0" >&2 && exit 2; }

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=(--device cuda) compare=(--pytorch compiled --rounds 5 --seconds 4) tiny=() short=() measure=()
generate=(--pytorch eager --rounds 5 --seconds 2)
if [ -n "$dry" ]; then
    export JAX_PLATFORMS=cpu
    device=(--device cpu) compare=(--pytorch compiled --rounds 1 --seconds 0.5) measure=(--rounds 1 --seconds 0.1)
    generate=(--pytorch eager --rounds 1 --seconds 0.1)
    tiny=(--model.n_layer 1 --model.n_head 1 --model.n_embd 64 --model.block_size 512 --data.batch_size 1)
    short=(--train.steps 4 --train.eval_interval 2 --train.eval_batches 1 --train.log_interval 1 --model.n_layer 1
        --train.steps_per_call 1 --train.sample_tokens 0 --optim.warmup_steps 1 --data.batch_size 2)
fi

run() { # one part
    local beside=(${nanogpt:+--nanogpt "$nanogpt"}) corpus=(${text:+--data.path "$text"})
    case "$1" in
        tests) # the lines that the tests print; several at a time share the GPU
            JAXGPT_TEST_OPTIMIZED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false \
                "${within[@]}" "$python" -m pytest -m gpu -rsP -n 4 --dist load tests/devices/test_gpu.py |
                tee >(cat >&2) | sed -n '/^{/p'
            ;;
        kernels) "${within[@]}" "$python" benchmarks/gpu/kernels.py "${measure[@]}" "${tiny[@]}" "${flags[@]}" ;;
        gpt2) # the driver leaves the GPU to the two sides, which hold half of its memory each
            JAX_PLATFORMS=cpu XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 "${within[@]}" "$python" benchmarks/compare.py gpt2 \
                "${device[@]}" "${beside[@]}" "${compare[@]}" "${tiny[@]}" "${flags[@]}"
            ;;
        generate)
            JAX_PLATFORMS=cpu "${within[@]}" "$python" benchmarks/compare.py gpt2-generate \
                "${device[@]}" "${beside[@]}" "${generate[@]}" "${tiny[@]}" "${flags[@]}"
            ;;
        *)
            "$python" benchmarks/gpu/recipe.py --limit "$limit" --config "$1" "${corpus[@]}" "${short[@]}" "${flags[@]}"
            ;;
    esac
}

within=(timeout --kill-after 10 "$limit") failed=0
for part in "${parts[@]}"; do
    echo "gpu.sh: $part, at $SECONDS s" >&2
    run "$part" || { echo "gpu.sh: $part failed ($?)" >&2 && failed=1; }
done
echo "gpu.sh: done, at $SECONDS s" >&2
exit $failed
