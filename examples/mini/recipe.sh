# The stages of the recipes of both small models: each run.sh sets its variables, and then sources this file. It also
# tells how the corpora are made (make_corpora), the YAML to train by is written (write_config), and the networks are
# trained (train_language_model, train_flow, train_vocoder).

source examples/stages.sh

stored_voices=(gongitsune nezumi kumo) # alpha is heard far worse from text than these
reading_voices=(slt awb kal16 ked)

mkdir -p "$work_dir"
write_config

stage_titles=(
    [0]="corpus"
    [1]="speech tokenizer, speaker encoder"
    [2]="tokens and vectors"
    [3]="parquet files"
    [5]="train the language model, and beside it the flow and then the vocoder"
    [6]="average"
    [7]="model folder"
)

folders=()
for corpus in "${corpora[@]}"; do
    folders+=("$work_dir/$corpus/train" "$work_dir/$corpus/dev")
done

make_corpus() { # the name of the corpus, options
    python examples/mini/make_corpus.py --des_dir "$work_dir/$1" --lexicon "$lexicon" --num_processes "$num_jobs" "${@:2}"
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
    python cosyvoice/bin/train.py --config "$config" --model "$2" --seed "$seed" --resume auto \
        --train_data "$work_dir/$1.train.list" --cv_data "$work_dir/$1.dev.list" "${train_options[@]}" \
        --model_dir "$work_dir/exp/$1" --tensorboard_dir "$work_dir/tensorboard/$1" --ddp.dist_backend gloo --use_amp "${@:3}"
}

average() { # the name of the run
    python cosyvoice/bin/average_model.py --dst_model "$work_dir/exp/$1/$1.pt" --src_path "$work_dir/exp/$1" ${averaged[$1]}
}

train_from() { # the run whose result it starts from, then as for train
    average "$1"
    train "$2" "$3" --checkpoint "$work_dir/exp/$1/$1.pt" "${@:4}"
}

stage_0() {
    make_corpora
}

stage_1() {
    python examples/mini/train_tokenizer.py --recipe "$recipe" --data "$work_dir"/{mixes,speakers,prompts}/train \
        --dev "$work_dir"/{mixes,prompts}/dev --output "$work_dir/$tokenizer" --pull "$pull" \
        --steps "$tokenizer_steps" --seed "$seed"
    python examples/mini/make_speaker_encoder.py --output "$work_dir/campplus.onnx"
}

stage_2() {
    local folder
    for folder in "${folders[@]}"; do
        echo "$folder"
        python tools/extract_speech_token.py --dir "$folder" --num_thread "$num_jobs" --onnx_path "$work_dir/$tokenizer"
        python tools/extract_embedding.py --dir "$folder" --num_thread "$num_jobs" --onnx_path "$work_dir/campplus.onnx"
    done
}

stage_3() {
    local folder
    for folder in "${folders[@]}"; do
        echo "$folder"
        # small ones: they are shuffled whole, and hold neighbours in a table that is sorted by speaker
        python tools/make_parquet_list.py --num_utts_per_parquet 100 --num_processes "$num_jobs" \
            --src_dir "$folder" --des_dir "$folder/parquet"
    done
}

stage_5() {
    write_lists
    python examples/mini/make_flow_start.py --config "$config" --output "$work_dir/exp/flow_start.pt" --seed "$seed"
    set -m # process groups of their own, so that each is stopped whole
    train_language_model &
    (
        train_flow
        train_vocoder
    ) &
    set +m
    trap 'for group in $(jobs -p); do kill -- "-$group" 2> /dev/null || true; done' EXIT
    wait -n # where one fails, the other is stopped
    wait -n
    trap - EXIT
}

stage_6() {
    local run
    for run in llm flow hifigan; do
        average "$run"
    done
}

stage_7() {
    python examples/mini/make_model_dir.py --recipe "$recipe" --work_dir "$work_dir" --voices "${stored_voices[@]}" \
        --model_dir "$model_dir"
}

run_stages 0 1 2 3 5 6 7
