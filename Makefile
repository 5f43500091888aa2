# make test    run the tests
# make test-faults   the long form of tests/faults: thousands of damaged files, and commands stopped at random moments
# make test-gpu   the tests that need a GPU (tests/gpu); elsewhere each says why it is left out
# make demo    the whole job on examples/raw_audio with CosyVoice-mini: prepare, train, merge, speak
# make bench   measure decoding, synthesis, training, preparation and start-up, with the threads that each size gets
# make eval    install the judges of tools/evaluate.py, and judge the voice that make demo left
# Each first makes .venv (make venv). PYTHON=python3.12 picks another interpreter for it.

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/installed
JUDGES := .venv/judges

.PHONY: venv test test-faults test-gpu demo bench eval

venv: $(INSTALLED)

$(INSTALLED): requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt -c constraints.txt
	touch $@

test: venv
	$(PY) -m pytest

test-faults: venv
	FAULT_CASES=500 FAULT_KILLS=10 $(PY) -m pytest tests/faults -rP

test-gpu: venv
	$(PY) -m pytest tests/gpu -rsP

MINI := pretrained_models/CosyVoice-mini
FOLDERS := --model-dir $(MINI) --output-dir demo/output
SENTENCE := This sentence is spoken without any reference audio.

demo: venv
	$(PY) prepare_joint_data.py --input-dir examples/raw_audio --speaker rms --model-dir $(MINI) --data-dir demo/data
	$(PY) train_joint.py --mode joint --data-dir demo/data $(FOLDERS)
	$(PY) merge_joint_weights.py $(FOLDERS)
	$(PY) inference_joint.py --text "$(SENTENCE)" --output demo/output/demo.wav $(FOLDERS)
	@echo
	@echo "Listen to the new voice: $(CURDIR)/demo/output/demo.wav"

bench: venv
	$(PY) bench/decode.py
	$(PY) bench/synthesis.py --sizes 300m
	$(PY) bench/synthesis.py --sizes mini --threads 1
	$(PY) bench/synthesis.py --sizes cosyvoice2
	$(PY) bench/train_steps.py --sizes 300m
	$(PY) bench/train_steps.py --sizes mini --threads 1
	$(PY) bench/train_steps.py --sizes cosyvoice2
	$(PY) bench/operations.py
	$(PY) bench/preparation.py
	$(PY) bench/start_up.py --sizes 300m
	$(PY) bench/start_up.py --sizes mini --threads 1
	$(PY) bench/start_up.py --sizes cosyvoice2

$(JUDGES): requirements-eval.txt $(INSTALLED)
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-eval.txt
	touch $@

EVALUATE_DEMO := --text-file examples/mini/eval_sentences.txt --reference examples/raw_audio $(FOLDERS)

eval: $(JUDGES)
	$(PY) tools/evaluate.py $(if $(wildcard demo/output/voice_*.json),$(EVALUATE_DEMO),--help)
