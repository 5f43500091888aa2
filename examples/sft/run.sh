#!/usr/bin/env bash
# Fine-tunes the whole of a CosyVoice2 or CosyVoice-300M on one speaker's clips, and speaks after every epoch, in stages:
#
#     0 tables    1 speaker vectors    2 speech tokens    3 parquet files    4 spk2info.pt    5 train llm, then flow
#
#     data_dir=/path/to/anna bash run.sh                            stages 0 to 4
#     data_dir=/path/to/anna stage=5 stop_stage=5 bash run.sh       stage 5
#
# Each variable below and in ../recipe.sh can be set like this. Folders are relative to this one. docs/sft.md tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./path.sh

stage=${stage:-0}
stop_stage=${stop_stage:-4}

data_dir=${data_dir-}                             # holds the two sets
train_set=${train_set:-train}                     # the names of their folders
dev_set=${dev_set:-test}
speaker=${speaker:-$(basename "$data_dir")}       # what the voice will be called
pretrained_model_dir=${pretrained_model_dir:-../../pretrained_models/CosyVoice2-0.5B}
settings=${settings:-conf/train.yaml}             # of training
models=${models:-llm flow}
texts=${texts:-conf/texts.txt}                    # what is spoken, beside the text of a held-out clip
sample_every=${sample_every:-1}                   # so many epochs; 0: never
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}

if [ -z "$data_dir" ]; then
    echo "run.sh: set data_dir to the folder that holds $train_set/ and $dev_set/" >&2
    exit 2
fi
train_sets=$train_set dev_sets=$dev_set test_sets='' corpus_dir=$data_dir
recipe=$speaker
results=exp/$recipe
config=$results/config.yaml
train_script=local/train.py
train_options=(--sample_every "$sample_every" --sample_texts "$texts" --sample_model_dir "$pretrained_model_dir"
    --sample_speakers "$results/spk2info.pt")
source ../recipe.sh

[[ $speaker =~ ^[^[:space:]/]+$ ]] || fail "'$speaker' cannot be a speaker's name; set speaker to one without blanks"
speech_tokenizer=$(python local/make_config.py --model_dir "$pretrained_model_dir" --settings "$settings" \
    --output "$config")

stage_0() {
    local x
    for x in "${sets[@]}"; do
        python local/prepare_data.py --src_dir "$corpus_dir/$x" --des_dir "data/$x" --speaker "$speaker"
    done
}

stage_3() {
    local x
    for x in "${sets[@]}"; do
        make_parquet "data/$x" "data/$x" --num_utts_per_parquet 20 # there may be few, and each GPU needs a file
    done
}

stage_titles[4]="$results/spk2info.pt"
stage_4() {
    python local/write_speaker.py --dir "data/$train_set" --model_dir "$pretrained_model_dir" \
        --output "$results/spk2info.pt"
}

stage_5() { # what llm learned is heard while flow trains, too
    local model trained_llm=()
    join_lists data/train.data.list "$train_set"
    join_lists data/dev.data.list "$dev_set"
    find_gpus
    for model in "${models[@]}"; do
        if [ "$model" = flow ] && [ -f "$results/llm.pt" ]; then
            trained_llm=(--sample_llm "$results/llm.pt")
        fi
        train "$model" "${trained_llm[@]}"
        python cosyvoice/bin/average_model.py --dst_model "$results/$model.pt" \
            --src_path "$results/$model/$train_engine" --num 1 --val_best
    done
    echo "To speak, in the project's folder: python inference_joint.py --model-dir MODEL --output-dir examples/sft/$results" \
        "--llm examples/sft/$results/llm.pt --flow examples/sft/$results/flow.pt --speaker $speaker --text ..."
}

run_stages 0 1 2 3 4 5
