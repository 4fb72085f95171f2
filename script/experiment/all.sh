#!/usr/bin/env bash
# How are all results of script/experiment/README.md reproduced? From texts to figures, in half an hour on one H200.
#
#   bash script/experiment/all.sh TEXTS WORK FIGURES [JOBS]
#
# TEXTS holds books-train, books-validation, proof-train and proof-validation (.jsonl.xz, lines of {"text"}) and
# sft_long_leval.jsonl.xz ({"input", "output"}). Finished steps in WORK are skipped, so a killed run resumes.
set -euo pipefail
texts=$(realpath "$1") work=$(realpath -m "$2") figures=$(realpath -m "$3") jobs=${4:-12}
cd "$(dirname "$0")/../.."

# results of somebody else in FIGURES are kept; a killed run that is resumed replaces its own
mine=$work/figures.path
if [ "$(cat "$mine" 2>/dev/null)" != "$figures" ] && ls "$figures" 2>/dev/null | grep -qE '^experiment'; then
    echo "error: FIGURES: $figures holds the results of another run; name another folder" && exit 1
fi
mkdir -p "$work/data" "$work/held-out" "$figures"
echo "$figures" >"$mine"

base=$work/base tokenizer=$work/tokenizer
[ -d "$tokenizer" ] || python3 script/experiment/tokenizer.py --output "$tokenizer" \
    --train "$texts"/{books,proof}-train.jsonl.xz

pieces() { # OUTPUT MIN_TOKENS MAX_TOKENS COUNT SOURCES...: split long texts
    [ -f "$1" ] || python3 script/data/build_pretrain.py --tokenizer "$tokenizer" --long_texts split --output "$1" \
        --min_tokens "$2" --max_tokens "$3" --num_samples "$4" --source "${@:5}"
}
held_out() { # NAME: .bin file to evaluate on
    pieces "$work/held-out/$1.jsonl" 24000 32768 10 "$texts/$1-validation.jsonl.xz"
    [ -f "$work/data/$1.bin" ] || python3 script/data/tokenize_bin.py --tokenizer "$tokenizer" \
        --source "$work/held-out/$1.jsonl" --output "$work/data/$1.bin"
}
pieces "$work/data/train.jsonl" 8200 9000 4000 "$texts"/{books,proof}-train.jsonl.xz & training=$!
held_out books & books=$!
held_out proof & proof=$!
[ -d "$base" ] || python3 script/experiment/pretrain.py --tokenizer "$tokenizer" --minutes 2.5 --output "$base" \
    --train "$texts"/{books,proof}-train.jsonl.xz --validation "$texts"/{books,proof}-validation.jsonl.xz
for one in $training $books $proof; do wait "$one"; done

# from here on, a failure does not stop the other parts
failed=""
part() { # NAME COMMAND: run once, with its output in WORK/NAME.log
    [ -f "$work/$1.done" ] && return
    if "${@:2}" >"$work/$1.log" 2>&1; then touch "$work/$1.done"; else tail -n 3 "$work/$1.log" && false; fi
}
rows() { python3 script/experiment/run.py --base "$base" --data "$work/data" --work "$work" "$@"; }
costly="longqlora full-attention rolled longlora attention-only attention-norms attention-embeddings all 16-bit full"
rows --cost --rows $costly --lengths 4096 || failed+=" costs" # one at a time; the first one tokenizes for all
# first one seed of the runs in the main table; then the others, in parallel with the downstream experiments
first="yarn-last longqlora full-last full-attention full full-yarn base untrained-linear untrained-dynamic untrained-yarn"
rows --jobs "$jobs" --seeds 1 --rows $first || failed+=" first-rows"

long=$work/runs/yarn-last-8192-0
passkey() {
    part passkey python3 script/experiment/downstream/passkey.py --base "$base" --adapter "$long" --work "$work/passkey" \
        --jobs 2 --output_json "$figures/experiment_passkey.json" --figure "$figures/experiment_passkey.png" \
        --overwrite
}
instructions() { # uses the extended model merged by passkey
    part instructions python3 script/experiment/downstream/instructions.py --base "$work/passkey/extended" --short_base "$base" \
        --source "$texts/sft_long_leval.jsonl.xz" --work "$work/instructions" \
        --output_json "$figures/experiment_instructions.json" --overwrite
}
examples() {
    part examples python3 script/experiment/downstream/examples.py --base "$base" --about "Models of 32 M parameters, pretrained from scratch for minutes: fluent style, little sense" --extended "$long" \
        --source "$texts/books-validation.jsonl.xz" --work "$work/examples" \
        --output_json "$figures/experiment_examples.json" \
        --long_figure "$figures/experiment_examples_long.png" \
        --short_figure "$figures/experiment_examples_short.png" --overwrite
}
(
    passkey || failed+=" passkey"
    instructions || failed+=" instructions"
    case "$failed" in *passkey* | *instructions*) exit 1 ;; esac
) & long_uses=$!
examples & examples=$!
rows --jobs "$jobs" --rows all || failed+=" rows"
python3 script/experiment/report.py --work "$work" --output "$figures" --overwrite || failed+=" report"
wait "$long_uses" || failed+=" passkey-or-instructions"
wait "$examples" || failed+=" examples"
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
