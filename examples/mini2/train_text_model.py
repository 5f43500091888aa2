#!/usr/bin/env python3
"""Teach CosyVoice2-mini's text model to spell, before it is trained on speech.

    examples/mini2/train_text_model.py --config data/mini2/cosyvoice2.yaml --text_model data/mini2/CosyVoice-BlankEN \\
        --lexicon data/mini/lexicon.txt.gz --texts data/mini2/texts/train/text

CosyVoice2 starts from a Qwen2 that has read the web. This one reads the words of a pronunciation lexicon, and says
their phones where it is to say speech tokens later: so a few hours of speech need not teach it English spelling.
Writes model.safetensors beside the text model's sizes. The same command continues a killed run.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEAK_RATE = 1e-3
HELD_OUT = 1000  # words of the lexicon


def main(argv: Sequence[str] | None = None) -> None:
    from cosyvoice.runtime.command import check_least
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the model with its llm_training")
    parser.add_argument("--text_model", type=Path, required=True, help="what make_text_model.py wrote")
    parser.add_argument("--lexicon", type=Path, required=True, help="of examples/mini/make_lexicon.py")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="tables of Kaldi-style folders")
    parser.add_argument("--steps", type=int, default=2400, help="of training (default: %(default)s)")
    add_seed(parser)
    options = parser.parse_args(argv)
    check_least("--steps", options.steps)

    from cosyvoice.model_folder.blank_en import WEIGHTS

    output = options.text_model / WEIGHTS
    if output.is_file():
        print(f"{output} is there already; delete it to train again")
        return

    import torch

    from cosyvoice.bin.text_model import HEAD
    from cosyvoice.model_folder.model_yaml import load_model_yaml
    from cosyvoice.runtime.command import seed_all
    from cosyvoice.tokenizer.phones import PhoneTokenizer
    from cosyvoice.tokenizer.qwen import get_qwen_tokenizer
    from examples.mini.encoder_training import Training
    from examples.mini2.spelling import Speller, next_phones_right
    from tools.blank_en import write_weights
    from tools.kaldi_folder import read_table

    seed_all(options.seed)
    overrides = {"qwen_pretrain_path": str(options.text_model)}
    model = load_model_yaml(options.config, parts=("llm_training",), overrides=overrides)["llm_training"]
    # Qwen2's own start, vectors of spread 0.02 beside speech tokens of spread 1, has gradients fifty times as large
    torch.nn.init.normal_(model.llm.embed_tokens.weight)
    letters, lexicon = get_qwen_tokenizer(str(options.text_model), True), PhoneTokenizer(options.lexicon)
    words = sorted(lexicon.lexicon)
    random.shuffle(words)
    texts = [text for table in options.texts for text in read_table(table).values() if lexicon.knows(text)]
    speller = Speller(letters, lexicon, words[HELD_OUT:], texts)
    unseen = Speller(letters, lexicon, words[:HELD_OUT], []).draw_batch()

    def report() -> str:
        return f"{next_phones_right(model, unseen):.3f} of the phones of unseen words right"

    training = Training(model, [], options.steps, options.seed, PEAK_RATE, output, {"texts": len(texts)})
    training.run(lambda: model(speller.draw_batch(), torch.device("cpu"))["loss"], report)
    weights = {name: value.contiguous() for name, value in model.llm.model.state_dict().items() if name != HEAD}
    write_weights(output, weights)
    training.checkpoint.unlink(missing_ok=True)
    print(f"{output}: {report()}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
