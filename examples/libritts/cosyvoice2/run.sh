#!/usr/bin/env bash
# The recipe for CosyVoice2, from a corpus to exported models, in stages:
#
#     -1 download    0 tables    1 speaker vectors    2 speech tokens    3 parquet files
#      5 train       6 average   7 export
#
#     bash run.sh                            stages -1 to 3
#     stage=5 stop_stage=7 bash run.sh       the others
#
# Each variable below and in ../../recipe.sh can be set like this. Folders are relative to this one. docs/recipes.md
# tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./path.sh

recipe=cosyvoice2
pretrained_model_dir=${pretrained_model_dir:-../../../pretrained_models/CosyVoice2-0.5B}
speech_tokenizer=speech_tokenizer_v2.onnx
config=${config:-conf/cosyvoice2.yaml}
train_options=(--qwen_pretrain_path "$pretrained_model_dir/CosyVoice-BlankEN")
source ../../recipe.sh

run_stages -1 0 1 2 3 5 6 7
