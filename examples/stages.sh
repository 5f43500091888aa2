# Stages of a recipe that run by number. Source this where stage and stop_stage are set: the first and the last to run.
# A stage is a function stage_NUMBER; stage_titles[NUMBER] says what it does.

declare -A stage_titles

fail() {
    echo "${0##*/}: $*" >&2
    exit 2
}

for number in "$stage" "$stop_stage"; do
    [[ $number =~ ^-?[0-9]+$ ]] || fail "the stage '$number' is not a whole number"
done

run_stages() { # the numbers of all stages of the recipe, in order; those that are asked for run
    local number
    for number in "$@"; do
        if [ "$stage" -le "$number" ] && [ "$stop_stage" -ge "$number" ]; then
            echo "Stage $number: ${stage_titles[$number]}"
            "stage_$number"
        fi
    done
}
