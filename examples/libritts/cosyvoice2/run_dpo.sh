#!/usr/bin/env bash
# Preference training of CosyVoice2's language model, in stages like those of run.sh:
#
#     -1 download    0 tables    1 speaker vectors    2 speech tokens
#      3 speak each text with the model itself, for its tokens to be rejected; parquet files that have both
#      5 train       6 average
#
#     bash run_dpo.sh                        stages -1 to 3; what run.sh has made is not made again
#     stage=5 stop_stage=6 bash run_dpo.sh   the others
#
# Each variable below and in ../../recipe.sh can be set like this. Folders are relative to this one. docs/recipes.md
# tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./path.sh

recipe=cosyvoice2_dpo
pretrained_model_dir=${pretrained_model_dir:-../../../pretrained_models/CosyVoice2-0.5B} # speaks, and is trained
ref_model=${ref_model:-$pretrained_model_dir/llm.pt}
speech_tokenizer=speech_tokenizer_v2.onnx
config=${config:-conf/cosyvoice2.yaml}
models=llm
test_sets=${test_sets-}
parquet_suffix=_reject
train_options=(--qwen_pretrain_path "$pretrained_model_dir/CosyVoice-BlankEN" --dpo --ref_model "$ref_model")
source ../../recipe.sh

stage_titles[3]="rejected samples, and parquet files that have them"
stage_3() {
    local x rejects
    for x in "${sets[@]}"; do
        rejects=data/$x$parquet_suffix # where make_parquet_list.py --dpo looks for their tokens
        python local/prepare_reject_sample.py --src_dir "data/$x" --des_dir "$rejects" --ref_model "$pretrained_model_dir"
        extract_tokens "$rejects"
        make_parquet "data/$x" "$rejects" --dpo
    done
}

run_stages -1 0 1 2 3 5 6
