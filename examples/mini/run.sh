#!/usr/bin/env bash
# CosyVoice-mini from nothing: its corpus, its encoders, its three networks and its model folder, in stages:
#
#     0 corpus    1 speech tokenizer, speaker encoder    2 tokens and vectors    3 parquet files
#     5 train     6 average                                 7 model folder
#
#     bash examples/mini/run.sh                          all of them
#     stage=5 stop_stage=6 bash examples/mini/run.sh     some
#
# A run that was stopped goes on where it was, by the same command. Each variable below can be set like stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 # two at a time share two cores

stage=${stage:-0}
stop_stage=${stop_stage:-7}
work_dir=${work_dir:-data/mini}                              # about 8 GB
model_dir=${model_dir:-pretrained_models/CosyVoice-mini}
seed=${seed:-1986}
num_jobs=${num_jobs:-2}

# Four neural voices that speak, and mixtures of five; three of flite's and one of festival's, whose many sentences teach
# reading (recipe.sh); pseudo-speakers and three people, so that a voice never heard before is nothing new.
base_voices=(alpha gongitsune nezumi kumo)
mixtures=(mix{1..30})
corpora=(voices mixes texts speakers prompts)
# what is named twice is heard twice as often
declare -A trained_on=([llm]="voices voices voices mixes mixes texts" [flow]="voices voices mixes mixes speakers prompts"
    [smooth]="texts speakers" [hifigan]="voices voices mixes mixes speakers prompts")
declare -A averaged=([llm]="--num 1 --val_best" [flow]="--num 1 --val_best" [smooth]="--num 1" [hifigan]="--num 1") # epochs

recipe=examples/mini
config=$work_dir/cosyvoice.yaml # beside the lexicon that it names
lexicon=$work_dir/lexicon.txt.gz
tokenizer=speech_tokenizer_v1.onnx
pull=0.15 # on neighbouring tokens, to be alike
tokenizer_steps=2500
train_options=()

make_corpora() {
    python examples/mini/make_lexicon.py --output "$lexicon"
    python examples/mini/make_prompts.py --des_dir "$work_dir/prompts" --num_processes "$num_jobs"
    make_corpus speakers --variants 7 --utterances 40 --dev_utterances 1 --seed $((seed + 2))
    make_corpus mixes --voices "${mixtures[@]}" --sentences wordnet --utterances 14 --dev_utterances 1 --seed $((seed + 1))
    make_corpus voices --voices "${base_voices[@]}" --sentences both --utterances 260 --dev_utterances 8 --seed "$seed"
    make_corpus texts --voices "${reading_voices[@]}" --sentences both --utterances 2000 --dev_utterances 10 --seed $((seed + 3))
    python examples/mini/align_text.py --lexicon "$lexicon" --dirs "$work_dir"/{voices,mixes,texts}/{train,dev}
}

write_config() {
    cp "$recipe/cosyvoice.yaml" "$config"
}

train_language_model() {
    train llm llm
}

train_flow() {
    train flow flow --checkpoint "$work_dir/exp/flow_start.pt"
}

train_vocoder() { # first from the old synthesisers, whose mels are as smooth as those of the flow
    train smooth hifigan --max_epoch 4
    train_from smooth hifigan hifigan --max_epoch 2 --total_steps 3200
}

source examples/mini/recipe.sh
