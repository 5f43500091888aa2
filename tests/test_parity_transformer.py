"""Attention stacks, masks, loss and samplers against the recorded numbers."""

import re

import pytest
import torch
from models import tiny
from parity import arrays, assert_close, cases, meta

from cosyvoice.transformer.embedding import relative_positions
from cosyvoice.transformer.label_smoothing_loss import LabelSmoothingLoss
from cosyvoice.utils import common, mask

ENCODERS = {
    "flow_encoder": ("flow", "encoder"),
    "text_encoder": ("llm", "text_encoder"),
    "lm": ("llm", "llm"),
}


@pytest.fixture(scope="module", params=cases("encoders"))
def recorded(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    return arrays(request.param) | {"chunk_sizes": meta(request.param)["chunk_sizes"]}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_parity_encoder_stack(recorded: dict, name: str) -> None:
    part, attribute = ENCODERS[name]
    encoder = getattr(tiny(part), attribute)
    x, lengths = recorded[f"{name}/x"], recorded[f"{name}/lens"]
    seen = {}
    first = encoder.encoders[0]
    encoder.embed.register_forward_hook(lambda *call: seen.update(embed_out=call[2]))
    first.self_attn.register_forward_hook(lambda *call: seen.update(layer0_attn_out=call[2]))
    first.register_forward_hook(lambda *call: seen.update(layer0_out=call[2]))
    seen["out"], valid = encoder(x, lengths)
    assert torch.equal(valid, recorded[f"{name}/mask"])
    frames = valid.squeeze(1)
    for key, value in seen.items():
        assert_close(value[frames], recorded[f"{name}/{key}"][frames], atol=5e-5)
    whole = relative_positions(x.size(1) - 1, 1 - x.size(1), encoder.output_size())
    assert_close(whole.unsqueeze(0), recorded[f"{name}/pos_emb"], atol=5e-5)
    used = mask.add_optional_chunk_mask(x, valid, False, False, 0, encoder.static_chunk_size, -1)
    assert torch.equal(used, recorded[f"{name}/attn_mask"])


def test_parity_position_tables(recorded: dict) -> None:
    tables = {key: value for key, value in recorded.items() if key.startswith("pos/")}
    assert tables
    for key, expected in tables.items():
        offset, size = map(int, re.fullmatch(r"pos/offset(\d+)_size(\d+)", key).groups())
        ours = relative_positions(offset + size - 1, 1 - offset - size, expected.size(2))
        assert_close(ours.unsqueeze(0), expected, atol=5e-5)


@torch.no_grad()
def test_parity_growing_sequence(recorded: dict) -> None:
    encoder = tiny("llm").llm
    x = recorded["chunk/x"]
    cache = encoder.new_cache()
    out = torch.cat([encoder.forward_chunk(part, cache) for part in x.split(recorded["chunk_sizes"], dim=1)], dim=1)
    assert_close(out, recorded["chunk/out"], atol=5e-5)
    assert_close(out, recorded["chunk/whole"], atol=5e-5)
    assert_close(stacked(cache), recorded["chunk/att_cache"], atol=5e-5)


def stacked(cache: list) -> torch.Tensor:
    """A cache as it is recorded: (blocks, H, T, 2 D), keys before values."""
    parts = [torch.cat((layer.keys, layer.values), dim=-1)[:, :, : layer.length] for layer in cache]
    return torch.cat(parts)


@pytest.mark.parametrize("name", cases("masks"))
def test_parity_masks(name: str) -> None:
    data = arrays(name)
    lengths = data["lens"]
    for key in data:
        function, _, settings = key.partition("/")
        if function == "subsequent_chunk_mask":
            size, chunk, left = map(int, settings.split("_"))
            assert torch.equal(mask.subsequent_chunk_mask(size, chunk, left), data[key])
        elif function == "add_optional_chunk_mask":
            valid = ~mask.make_pad_mask(lengths).unsqueeze(1)
            options = meta(name)[settings]
            ours = mask.add_optional_chunk_mask(valid.transpose(1, 2).float(), valid, **options)
            assert torch.equal(ours, data[key])
        elif function.startswith("make_pad_mask"):
            longest = function.removeprefix("make_pad_mask").removeprefix("_max")
            assert torch.equal(mask.make_pad_mask(lengths, int(longest or 0)), data[key])
        elif function.startswith("subsequent_mask_"):
            size = int(function.removeprefix("subsequent_mask_"))
            assert torch.equal(mask.subsequent_chunk_mask(size, 1), data[key])
    valid = ~mask.make_pad_mask(lengths).unsqueeze(1)
    assert torch.equal(mask.mask_to_bias(valid, torch.float32), data["mask_to_bias"])


@pytest.mark.parametrize("name", cases("masks"))
def test_parity_loss_and_accuracy(name: str) -> None:
    data = arrays(name)
    logits, target = data["ce/logits"], data["ce/target"]
    losses = [key for key in data if key.startswith("ce/loss")]
    assert losses
    for key in losses:
        smoothing, normalized = key.removeprefix("ce/loss_smooth").split("_norm")
        criterion = LabelSmoothingLoss(logits.size(-1), common.IGNORE_ID, float(smoothing), normalized == "True")
        assert_close(criterion(logits, target), data[key], atol=1e-6, rtol=1e-6)
    ours = common.th_accuracy(logits.flatten(0, 1), target, common.IGNORE_ID)
    assert torch.equal(ours, data["ce/acc"].to(ours.dtype))


SAMPLING_CASES = [(name, case) for name in cases("sampling") for case in meta(name)["cases"]]


def draw(sampler: str, settings: dict, scores: torch.Tensor, past: list[int]) -> int:
    if sampler == "random":
        return common.random_sampling(scores, past, 25)
    if sampler == "nucleus":
        return common.nucleus_sampling(scores, settings["ras"]["top_p"], settings["ras"]["top_k"])
    return common.ras_sampling(scores, past, 25, **settings[sampler])


@pytest.mark.parametrize(("name", "case"), SAMPLING_CASES)
def test_parity_samplers(name: str, case: dict) -> None:
    data, settings = arrays(name), meta(name)
    scores = data[f"{case['i']}/logp"]
    before = scores.clone()
    for sampler, expected in case["ids"].items():
        for seed, token in zip(case["seeds"], expected, strict=True):
            torch.manual_seed(seed)
            assert draw(sampler, settings, scores, case["past"]) == token
    assert torch.equal(scores, before), "a sampler changed the scores it was given"
    for key, sampler in (("nucleus_probs", "ras"), ("ras_strict_probs", "ras_strict")):
        ours, _ = common.nucleus_candidates(scores, settings[sampler]["top_p"], settings[sampler]["top_k"])
        assert_close(ours, data[f"{case['i']}/{key}"], rtol=1e-5)


def test_parity_pad_list() -> None:
    for name in cases("masks"):
        expected = arrays(name)["pad_list"]
        lengths = [int((row != common.IGNORE_ID).sum()) for row in expected]
        rows = [row[:length] for row, length in zip(expected, lengths, strict=True)]
        assert torch.equal(common.pad_list(rows, common.IGNORE_ID), expected)
