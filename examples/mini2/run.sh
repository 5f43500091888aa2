#!/usr/bin/env bash
# CosyVoice2-mini from the recordings of CosyVoice-mini: its text model, encoders, three networks and folder, in stages:
#
#     0 corpus, text model    1 speech tokenizer, speaker encoder    2 tokens and vectors    3 parquet files
#     5 train    6 average    7 model folder
#
#     bash examples/mini2/run.sh                          all of them
#     stage=5 stop_stage=6 bash examples/mini2/run.sh     some
#
# A run that was stopped goes on where it was, by the same command. Each variable below can be set like stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 # two at a time share two cores

stage=${stage:-0}
stop_stage=${stop_stage:-7}
corpus_dir=${corpus_dir:-data/mini}                           # what stage 0 of examples/mini/run.sh makes
work_dir=${work_dir:-data/mini2}                              # about 9 GB
model_dir=${model_dir:-pretrained_models/CosyVoice2-mini}
seed=${seed:-1986}
num_jobs=${num_jobs:-2}

recipe=examples/mini2
config=$work_dir/cosyvoice2.yaml
lexicon=$corpus_dir/lexicon.txt.gz
tokenizer=speech_tokenizer_v2.onnx
pull=0 # on neighbouring tokens, to be alike: these are twice as far apart as those of CosyVoice-mini
tokenizer_steps=4000
train_options=(--qwen_pretrain_path "$work_dir/CosyVoice-BlankEN")
of_mini=(voices mixes texts speakers prompts)
corpora=("${of_mini[@]}" more_voices more_texts) # letters need more words than phones do
# what is named twice is heard twice as often
declare -A trained_on=([reading]="voices voices voices mixes mixes texts"
    [llm]="voices mixes more_voices more_voices texts more_texts" [first_flow]="voices voices mixes mixes"
    [flow]="voices voices mixes mixes more_voices more_voices speakers prompts"
    [hifigan]="voices voices mixes mixes speakers prompts")
# the last epoch of the language model: even where its held-out loss grows, it is understood better from epoch to epoch
declare -A averaged=([reading]="--num 1" [llm]="--num 1" [first_flow]="--num 1" [flow]="--num 1" [hifigan]="--num 3 --val_best")

make_corpora() {
    local corpus split folder
    work_dir=$corpus_dir stage=0 stop_stage=0 bash examples/mini/run.sh
    for corpus in "${of_mini[@]}"; do
        for split in train dev; do
            folder=$work_dir/$corpus/$split
            mkdir -p "$folder"
            cp "$corpus_dir/$corpus/$split"/{wav.scp,text,utt2spk,spk2utt} "$folder"
        done
    done
    make_corpus more_voices --voices "${stored_voices[@]}" --sentences both --utterances 280 --dev_utterances 4 --seed $((seed + 4))
    make_corpus more_texts --voices "${reading_voices[@]}" --sentences both --utterances 4000 --dev_utterances 10 --seed $((seed + 5))
    python examples/mini2/make_text_model.py --texts "$work_dir"/{voices,mixes,texts}/train/text \
        --des_dir "$work_dir/CosyVoice-BlankEN"
    python examples/mini2/train_text_model.py --config "$config" --text_model "$work_dir/CosyVoice-BlankEN" \
        --lexicon "$lexicon" --texts "$work_dir"/{voices,mixes,texts}/train/text --seed "$seed"
}

write_config() {
    cat "$recipe/cosyvoice2.yaml" "$recipe/training.yaml" >"$config"
}

train_language_model() { # twice, and the second time with three times as much to read
    train reading llm
    train_from reading llm llm --max_epoch 4
}

train_flow() { # twice, and the second time with all voices
    train first_flow flow --checkpoint "$work_dir/exp/flow_start.pt"
    train_from first_flow flow flow --max_epoch 5 --total_steps 4700
}

train_vocoder() {
    train hifigan hifigan
}

source examples/mini/recipe.sh
