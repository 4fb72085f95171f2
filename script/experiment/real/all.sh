#!/usr/bin/env bash
# How are all results on a real pretrained model reproduced? Rows, report, long instructions, RULER after them, examples.
#
#   bash script/experiment/real/all.sh BASE TEXTS WORK FIGURES [JOBS] [FLAGS OF run.py ...]
#
# BASE is a folder (real/base.py makes SmolLM2's) or a hub id. TEXTS holds NAME-train and NAME-validation files of
# {"text"} records for each kind of text, sft_short (texts unlike those, {"output"}) and sft_long_leval ({"input",
# "output"}), all .jsonl.xz; the first kind in alphabetical order is continued in the examples. JOBS rows are trained at
# a time, on the visible GPUs in turn. Finished steps in WORK are skipped, so a killed run resumes.
set -euo pipefail
base=$1 texts=$(realpath "$2") work=$(realpath -m "$3") figures=$(realpath -m "$4") jobs=${5:-1}
[ -d "$base" ] && base=$(realpath "$base")
cd "$(dirname "$0")/../../.."
mkdir -p "$work" "$figures"

python3 script/experiment/real/run.py --base "$base" --texts "$texts" --work "$work" --rows all --keep ours \
    --other "$texts/sft_short.jsonl.xz" --other_key output --jobs "$jobs" "${@:6}"
python3 script/experiment/real/report.py --work "$work" --output "$figures" --overwrite

extended=$work/extended
[ -d "$extended" ] || python3 script/merge_lora.py --adapter_name_or_path "$work/runs/ours-0" --save_path "$extended"
part() { # NAME COMMAND: run once, with its output in WORK/NAME.log
    [ -f "$work/$1.done" ] && return
    if "${@:2}" >"$work/$1.log" 2>&1; then touch "$work/$1.done"; else tail -n 3 "$work/$1.log" && false; fi
}
part instructions python3 script/experiment/downstream/instructions.py --base "$extended" --short_base "$base" \
    --source "$texts/sft_long_leval.jsonl.xz" --work "$work/instructions" --epochs 2 \
    --output_json "$work/real_instructions.json" --overwrite
context=$(python3 -c "import json, sys; print(json.load(open(sys.argv[1]))['max_position_embeddings'])" "$extended/config.json")
ruler() { # NAME MODEL FLAGS: of RULER
    part "ruler-$1" python3 script/evaluate/ruler.py --peft_model "$work/instructions/$2" --samples 25 \
        --template completion --resume --output_json "$work/real_ruler_$1.json" "${@:3}"
}
ruler tuned extended --lengths 4096 8192 "$context" --figure "$work/real_ruler_tuned.png" --overwrite
ruler control short --lengths 4096 8192 --tasks niah_single_1 niah_single_2 niah_multivalue
validation=$(ls "$texts"/*-validation.jsonl.xz | head -n 1)
part examples python3 script/experiment/downstream/examples.py --base "$base" --extended "$extended" \
    --source "$validation" --work "$work/examples" --long_tokens $((context * 6 / 10)) $((context * 9 / 10)) \
    --output_json "$work/real_examples.json" --long_figure "$work/longdemo.png" \
    --short_figure "$work/shortdemo.png" --overwrite
cp "$work"/real_*.{json,png} "$work"/{long,short}demo.png "$figures"
