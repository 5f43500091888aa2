#!/usr/bin/env bash
# The recipe for CosyVoice v1, from a corpus to exported models, in stages:
#
#     -1 download    0 tables    1 speaker vectors    2 speech tokens    3 parquet files
#      5 train       6 average   7 export
#
#     bash run.sh                            stages -1 to 3
#     stage=5 stop_stage=7 bash run.sh       the others
#
# Each variable below can be set like this. Folders are relative to this one. docs/recipes.md tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./path.sh

stage=${stage:--1}
stop_stage=${stop_stage:-3}

data_url=${data_url:-https://www.openslr.org/resources/60}
data_dir=${data_dir:-../../../data}               # downloads go here
corpus_dir=${corpus_dir:-$data_dir/LibriTTS}      # the sets are its subfolders
pretrained_model_dir=${pretrained_model_dir:-../../../pretrained_models/CosyVoice-300M}

train_sets=${train_sets-train-clean-100 train-clean-360 train-other-500}
dev_sets=${dev_sets-dev-clean dev-other}
test_sets=${test_sets-test-clean test-other}
num_jobs=${num_jobs:-$(getconf _NPROCESSORS_ONLN)} # utterances or files at a time in stages 1 to 3

config=${config:-conf/cosyvoice.yaml}
models=${models:-llm flow hifigan}
from_scratch=${from_scratch:-false}               # true: train without pretrained weights
train_engine=${train_engine:-torch_ddp}           # or deepspeed
average_num=${average_num:-5}                     # checkpoints
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3}

# Names of sets and models hold no blanks, which separate them.
read -ra train_sets <<<"$train_sets"
read -ra dev_sets <<<"$dev_sets"
read -ra test_sets <<<"$test_sets"
read -ra models <<<"$models"
sets=("${train_sets[@]}" "${dev_sets[@]}" "${test_sets[@]}")

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

for number in "$stage" "$stop_stage"; do
    [[ $number =~ ^-?[0-9]+$ ]] || fail "the stage '$number' is not a whole number"
done

asks_for() { # the number of a stage
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ]
}

join_lists() { # names of sets; their data.list one after another
    local x
    for x in "$@"; do
        [ -f "data/$x/parquet/data.list" ] || fail "data/$x/parquet/data.list does not exist; run stage 3 first"
        cat "data/$x/parquet/data.list"
    done
}

pretrained() { # the name of a model; its pretrained weights, which for the vocoder have two names
    local weights=$pretrained_model_dir/$1.pt
    if [ "$1" = hifigan ] && [ ! -f "$weights" ]; then
        weights=$pretrained_model_dir/hift.pt
    fi
    echo "$weights"
}

if asks_for -1; then
    echo "Stage -1: download LibriTTS"
    for x in "${sets[@]}"; do
        local/download_and_untar.sh "$data_dir" "$data_url" "$x"
    done
fi

if asks_for 0; then
    echo "Stage 0: tables"
    for x in "${sets[@]}"; do
        python local/prepare_data.py --src_dir "$corpus_dir/$x" --des_dir "data/$x"
    done
fi

if asks_for 1; then
    echo "Stage 1: speaker vectors"
    for x in "${sets[@]}"; do
        python tools/extract_embedding.py --dir "data/$x" --num_thread "$num_jobs" \
            --onnx_path "$pretrained_model_dir/campplus.onnx"
    done
fi

if asks_for 2; then
    echo "Stage 2: speech tokens"
    for x in "${sets[@]}"; do
        python tools/extract_speech_token.py --dir "data/$x" --num_thread "$num_jobs" \
            --onnx_path "$pretrained_model_dir/speech_tokenizer_v1.onnx"
    done
fi

if asks_for 3; then
    echo "Stage 3: parquet files"
    for x in "${sets[@]}"; do
        python tools/make_parquet_list.py --num_utts_per_parquet 1000 --num_processes "$num_jobs" \
            --src_dir "data/$x" --des_dir "data/$x/parquet"
    done
fi

if asks_for 5; then
    echo "Stage 5: train ${models[*]}"
    mkdir -p data
    join_lists "${train_sets[@]}" >data/train.data.list
    join_lists "${dev_sets[@]}" >data/dev.data.list
    num_gpus=$(python -c "import torch
from cosyvoice.runtime.device import fastest_device
print(torch.cuda.device_count() if fastest_device().type == 'cuda' else 0)")
    if [ "$num_gpus" -gt 0 ]; then
        # a port that is free: another run may be at work on other GPUs
        start=(torchrun --standalone --nproc_per_node="$num_gpus") dist_backend=nccl on_device=(--pin_memory --use_amp)
    else
        echo "no GPU that torch computes on: one process on the CPU"
        start=(python) dist_backend=gloo on_device=()
    fi
    for model in "${models[@]}"; do
        start_from=()
        if [ "$from_scratch" = false ]; then
            start_from=(--checkpoint "$(pretrained "$model")")
        fi
        "${start[@]}" cosyvoice/bin/train.py \
            --train_engine "$train_engine" \
            --config "$config" \
            --train_data data/train.data.list \
            --cv_data data/dev.data.list \
            --model "$model" \
            "${start_from[@]}" \
            --resume auto \
            --model_dir "$PWD/exp/cosyvoice/$model/$train_engine" \
            --tensorboard_dir "$PWD/tensorboard/cosyvoice/$model/$train_engine" \
            --ddp.dist_backend "$dist_backend" \
            --num_workers 2 \
            --prefetch 100 \
            "${on_device[@]}" \
            --deepspeed_config ./conf/ds_stage2.json \
            --deepspeed.save_states model+optimizer
    done
fi

if asks_for 6; then
    echo "Stage 6: average the best $average_num checkpoints"
    for model in "${models[@]}"; do
        python cosyvoice/bin/average_model.py \
            --dst_model "$PWD/exp/cosyvoice/$model/$train_engine/$model.pt" \
            --src_path "$PWD/exp/cosyvoice/$model/$train_engine" \
            --num "$average_num" \
            --val_best
    done
fi

if asks_for 7; then
    echo "Stage 7: export $pretrained_model_dir; copy averaged weights there first to export those"
    python cosyvoice/bin/export_jit.py --model_dir "$pretrained_model_dir"
    python cosyvoice/bin/export_onnx.py --model_dir "$pretrained_model_dir"
fi
