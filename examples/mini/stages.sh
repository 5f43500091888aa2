# The stages of the recipes of both small models: each run.sh sets its variables, and then sources this file. It also
# tells how the corpora are made (make_corpora) and the YAML to train by is written (write_config).

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

for number in "$stage" "$stop_stage"; do
    [[ $number =~ ^-?[0-9]+$ ]] || fail "the stage '$number' is not a whole number"
done

mkdir -p "$work_dir"
write_config

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
    python cosyvoice/bin/train.py --config "$config" --model "$2" --seed "$seed" --resume auto \
        --train_data "$work_dir/$1.train.list" --cv_data "$work_dir/$1.dev.list" "${train_options[@]}" \
        --model_dir "$work_dir/exp/$1" --tensorboard_dir "$work_dir/tensorboard/$1" --ddp.dist_backend gloo --use_amp "${@:3}"
}

if asks_for 0; then
    echo "Stage 0: corpus"
    make_corpora
fi

if asks_for 1; then
    echo "Stage 1: speech tokenizer, speaker encoder"
    python examples/mini/train_tokenizer.py --recipe "$recipe" --data "$work_dir"/{mixes,speakers,prompts}/train \
        --dev "$work_dir"/{mixes,prompts}/dev --output "$work_dir/$tokenizer" --pull "$pull" --seed "$seed"
    python examples/mini/make_speaker_encoder.py --output "$work_dir/campplus.onnx"
fi

for corpus in "${corpora[@]}"; do
    for split in train dev; do
        folder=$work_dir/$corpus/$split
        if asks_for 2; then
            echo "Stage 2: tokens and vectors of $folder"
            python tools/extract_speech_token.py --dir "$folder" --num_thread "$num_jobs" \
                --onnx_path "$work_dir/$tokenizer"
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
    python examples/mini/make_flow_start.py --config "$config" --output "$work_dir/exp/flow_start.pt" --seed "$seed"
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
    python examples/mini/make_model_dir.py --recipe "$recipe" --work_dir "$work_dir" --voices "${stored_voices[@]}" --model_dir "$model_dir"
fi
