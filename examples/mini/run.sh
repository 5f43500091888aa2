#!/usr/bin/env bash
# CosyVoice-mini from nothing: its corpus, its encoders, its three networks and its model folder, in stages:
#
#     0 corpus    1 speech tokenizer, speaker encoder, places in the texts    2 tokens and vectors    3 parquet files
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

# Four neural voices that speak, and mixtures of five; two of flite's and two of festival's, whose many sentences teach
# reading; pseudo-speakers and three people, so that a voice never heard before is nothing new.
base_voices=(alpha gongitsune nezumi kumo)
stored_voices=(gongitsune nezumi kumo) # alpha is heard far worse from text than these
mixtures=(mix{1..30})
reading_voices=(slt awb kal16 ked)
corpora=(voices mixes texts speakers prompts)
# what is named twice is heard twice as often
declare -A trained_on=([llm]="voices voices voices mixes mixes texts" [flow]="voices voices mixes mixes speakers prompts"
    [hifigan]="voices voices mixes mixes speakers prompts")
declare -A averaged=([llm]=1 [flow]=1 [hifigan]=3) # epochs, of the least held-out loss

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

for number in "$stage" "$stop_stage"; do
    [[ $number =~ ^-?[0-9]+$ ]] || fail "the stage '$number' is not a whole number"
done

mkdir -p "$work_dir"
config=$work_dir/cosyvoice.yaml # beside the lexicon that it names
cp examples/mini/cosyvoice.yaml "$config"
lexicon=$work_dir/lexicon.txt.gz

asks_for() { # the number of a stage
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ]
}

write_lists() { # of all runs, so that what is missing shows at the start
    local run split corpus part
    for run in "${!trained_on[@]}"; do
        for split in train dev; do
            for corpus in ${trained_on[$run]}; do
                part=$work_dir/$corpus/$split/parquet/data.list
                [ -f "$part" ] || fail "$part does not exist; run stages 0 to 3 first"
                cat "$part"
            done >"$work_dir/$run.$split.list"
        done
    done
}

train() { # the name of the run, the network, options
    python cosyvoice/bin/train.py --config $config --model "$2" --seed "$seed" --resume auto \
        --train_data "$work_dir/$1.train.list" --cv_data "$work_dir/$1.dev.list" \
        --model_dir "$work_dir/exp/$1" --tensorboard_dir "$work_dir/tensorboard/$1" --ddp.dist_backend gloo --use_amp "${@:3}"
}

make_corpus() { # the name of the corpus, options
    python examples/mini/make_corpus.py --des_dir "$work_dir/$1" --lexicon "$lexicon" --num_processes "$num_jobs" "${@:2}"
}

if asks_for 0; then
    echo "Stage 0: corpus"
    python examples/mini/make_lexicon.py --output "$lexicon"
    python examples/mini/make_prompts.py --des_dir "$work_dir/prompts" --num_processes "$num_jobs"
    make_corpus speakers --variants 7 --utterances 40 --dev_utterances 1 --seed $((seed + 2))
    make_corpus mixes --voices "${mixtures[@]}" --sentences wordnet --utterances 14 --dev_utterances 1 --seed $((seed + 1))
    make_corpus voices --voices "${base_voices[@]}" --sentences both --utterances 260 --dev_utterances 8 --seed "$seed"
    make_corpus texts --voices "${reading_voices[@]}" --sentences both --utterances 2000 --dev_utterances 10 --seed $((seed + 3))
fi

if asks_for 1; then
    echo "Stage 1: speech tokenizer, speaker encoder, places in the texts"
    python examples/mini/train_tokenizer.py --data "$work_dir"/{mixes,speakers,prompts}/train \
        --dev "$work_dir"/{mixes,prompts}/dev --output "$work_dir/speech_tokenizer_v1.onnx" --seed "$seed"
    python examples/mini/make_speaker_encoder.py --output "$work_dir/campplus.onnx"
    python examples/mini/align_text.py --lexicon "$lexicon" --dirs "$work_dir"/{voices,mixes,texts}/{train,dev}
fi

for corpus in "${corpora[@]}"; do
    for split in train dev; do
        folder=$work_dir/$corpus/$split
        if asks_for 2; then
            echo "Stage 2: tokens and vectors of $folder"
            python tools/extract_speech_token.py --dir "$folder" --num_thread "$num_jobs" \
                --onnx_path "$work_dir/speech_tokenizer_v1.onnx"
            python tools/extract_embedding.py --dir "$folder" --num_thread "$num_jobs" \
                --onnx_path "$work_dir/campplus.onnx"
        fi
        if asks_for 3; then
            echo "Stage 3: parquet files of $folder"
            # small ones: they are shuffled whole, and hold neighbours in a table that is sorted by speaker
            python tools/make_parquet_list.py --num_utts_per_parquet 100 --num_processes "$num_jobs" \
                --src_dir "$folder" --des_dir "$folder/parquet"
        fi
    done
done

if asks_for 5; then
    echo "Stage 5: train the language model, and beside it the flow and then the vocoder"
    write_lists
    python examples/mini/make_flow_start.py --config $config --output "$work_dir/exp/flow_start.pt" --seed "$seed"
    set -m # process groups of their own, so that each is stopped whole
    train llm llm &
    (
        train flow flow --checkpoint "$work_dir/exp/flow_start.pt"
        train hifigan hifigan
    ) &
    set +m
    trap 'for group in $(jobs -p); do kill -- "-$group" 2> /dev/null || true; done' EXIT
    wait -n # where one fails, the other is stopped
    wait -n
    trap - EXIT
fi

if asks_for 6; then
    echo "Stage 6: average"
    for model in llm flow hifigan; do
        python cosyvoice/bin/average_model.py --dst_model "$work_dir/exp/$model/$model.pt" \
            --src_path "$work_dir/exp/$model" --num "${averaged[$model]}" --val_best
    done
fi

if asks_for 7; then
    echo "Stage 7: model folder"
    python examples/mini/make_model_dir.py --work_dir "$work_dir" --voices "${stored_voices[@]}" --model_dir "$model_dir"
fi
