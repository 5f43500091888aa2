# The stages that the training recipes share. A run.sh goes to its own folder, sets
#
#     recipe             the name of its folders in exp/ and tensorboard/
#     speech_tokenizer   the file in pretrained_model_dir
#     pretrained_model_dir, config   and those defaults below that differ
#     train_options      an array: what train.py gets beside the options below; may be empty
#     train_script       another script that trains (default: cosyvoice/bin/train.py)
#
# sources this file, and ends in `run_stages NUMBER...`, which runs those of its stages that are asked for. A function
# stage_NUMBER and stage_titles[NUMBER] replace a stage or add one.

stage=${stage:--1}
stop_stage=${stop_stage:-3}

data_url=${data_url:-https://www.openslr.org/resources/60}
data_dir=${data_dir:-../../../data}               # downloads go here
corpus_dir=${corpus_dir:-$data_dir/LibriTTS}      # the sets are its subfolders

train_sets=${train_sets-train-clean-100 train-clean-360 train-other-500}
dev_sets=${dev_sets-dev-clean dev-other}
test_sets=${test_sets-test-clean test-other}
num_jobs=${num_jobs:-$(getconf _NPROCESSORS_ONLN)} # utterances or files at a time in stages 1 to 3
engine=${engine:-pool}                            # of stages 1 to 3; ray: the cluster at RAY_ADDRESS

models=${models:-llm flow hifigan}
from_scratch=${from_scratch:-false}               # true: train without pretrained weights
train_engine=${train_engine:-torch_ddp}           # or deepspeed
torchrun_options=${torchrun_options:---standalone} # on a free port; or --nnodes and where the machines meet
average_num=${average_num:-5}                     # checkpoints
train_script=${train_script:-cosyvoice/bin/train.py}
parquet_suffix=${parquet_suffix-}                 # training reads data/SET$parquet_suffix/parquet
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3}

# Names of sets and models hold no blanks, which separate them.
read -ra train_sets <<<"$train_sets"
read -ra dev_sets <<<"$dev_sets"
read -ra test_sets <<<"$test_sets"
read -ra models <<<"$models"
read -ra torchrun_options <<<"$torchrun_options"
sets=("${train_sets[@]}" "${dev_sets[@]}" "${test_sets[@]}")

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

stage_titles+=(
    [-1]="download LibriTTS"
    [0]="tables"
    [1]="speaker vectors"
    [2]="speech tokens"
    [3]="parquet files"
    [5]="train ${models[*]}"
    [6]="average the best $average_num checkpoints"
    [7]="export $pretrained_model_dir; copy averaged weights there first to export those"
)

stage_-1() {
    local x
    for x in "${sets[@]}"; do
        local/download_and_untar.sh "$data_dir" "$data_url" "$x"
    done
}

stage_0() {
    local x
    for x in "${sets[@]}"; do
        python local/prepare_data.py --src_dir "$corpus_dir/$x" --des_dir "data/$x"
    done
}

stage_1() {
    local x
    for x in "${sets[@]}"; do
        python tools/extract_embedding.py --dir "data/$x" --num_thread "$num_jobs" --engine "$engine" \
            --onnx_path "$pretrained_model_dir/campplus.onnx"
    done
}

extract_tokens() { # a folder with wav.scp
    python tools/extract_speech_token.py --dir "$1" --num_thread "$num_jobs" --engine "$engine" \
        --onnx_path "$pretrained_model_dir/$speech_tokenizer"
}

stage_2() {
    local x
    for x in "${sets[@]}"; do
        extract_tokens "data/$x"
    done
}

make_parquet() { # a folder of tables, where parquet/ goes, options
    python tools/make_parquet_list.py --num_utts_per_parquet 1000 --num_processes "$num_jobs" \
        --engine "$engine" --src_dir "$1" --des_dir "$2/parquet" "${@:3}"
}

stage_3() {
    local x
    for x in "${sets[@]}"; do
        make_parquet "data/$x" "data/$x"
    done
}

join_lists() { # where to, names of sets: their data.list one after another
    local x lists=()
    for x in "${@:2}"; do
        x=data/$x$parquet_suffix/parquet/data.list
        [ -f "$x" ] || fail "$x does not exist; run stage 3 first"
        lists+=("$x")
    done
    [ ${#lists[@]} -gt 0 ] || fail "there is no set for $1; name some in train_sets and dev_sets"
    cat "${lists[@]}" >"$1"
}

pretrained() { # the name of a model; its pretrained weights, which for the vocoder have two names
    local weights=$pretrained_model_dir/$1.pt
    if [ "$1" = hifigan ] && [ ! -f "$weights" ]; then
        weights=$pretrained_model_dir/hift.pt
    fi
    echo "$weights"
}

find_gpus() { # set what training is started with, and what it is told about GPUs
    local num_gpus
    num_gpus=$(python -c "import torch
from cosyvoice.runtime.device import fastest_device
print(torch.cuda.device_count() if fastest_device().type == 'cuda' else 0)")
    if [ "$num_gpus" -gt 0 ]; then
        start=(torchrun "${torchrun_options[@]}" --nproc_per_node="$num_gpus")
        dist_backend=nccl on_device=(--pin_memory --use_amp)
    else
        echo "no GPU that torch computes on: one process on the CPU"
        start=(python) dist_backend=gloo on_device=()
    fi
}

train() { # the name of a model, options
    local start_from=()
    if [ "$from_scratch" = false ]; then
        start_from=(--checkpoint "$(pretrained "$1")")
    fi
    "${start[@]}" "$train_script" \
        --train_engine "$train_engine" \
        --config "$config" \
        --train_data "data/train$parquet_suffix.data.list" \
        --cv_data "data/dev$parquet_suffix.data.list" \
        --model "$1" \
        "${start_from[@]}" \
        --resume auto \
        --model_dir "$PWD/exp/$recipe/$1/$train_engine" \
        --tensorboard_dir "$PWD/tensorboard/$recipe/$1/$train_engine" \
        --ddp.dist_backend "$dist_backend" \
        --num_workers 2 \
        --prefetch 100 \
        "${on_device[@]}" \
        --deepspeed_config ./conf/ds_stage2.json \
        --deepspeed.save_states model+optimizer \
        "${train_options[@]}" \
        "${@:2}"
}

stage_5() {
    local model
    join_lists "data/train$parquet_suffix.data.list" "${train_sets[@]}"
    join_lists "data/dev$parquet_suffix.data.list" "${dev_sets[@]}"
    find_gpus
    for model in "${models[@]}"; do
        train "$model"
    done
}

stage_6() {
    local model
    for model in "${models[@]}"; do
        python cosyvoice/bin/average_model.py \
            --dst_model "$PWD/exp/$recipe/$model/$train_engine/$model.pt" \
            --src_path "$PWD/exp/$recipe/$model/$train_engine" \
            --num "$average_num" \
            --val_best
    done
}

stage_7() {
    python cosyvoice/bin/export_jit.py --model_dir "$pretrained_model_dir"
    python cosyvoice/bin/export_onnx.py --model_dir "$pretrained_model_dir"
}
