"""The language model against the recorded numbers: training loss with gradients, step-by-step decoding, sampling."""

import pytest
import torch
from models import tiny
from parity import arrays, assert_close, cases, meta
from torch import Tensor

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.common import IGNORE_ID

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", cases("llm_train"))
def test_parity_training(name: str) -> None:
    data, llm = arrays(name), tiny("llm")
    batch = {key.removeprefix("batch/"): value for key, value in data.items() if key.startswith("batch/")}
    seen = {}
    llm.text_encoder.register_forward_hook(lambda *call: seen.update(text_encoder_out=call[2][0]))
    llm.text_encoder_affine_layer.register_forward_hook(lambda *call: seen.update(text_affine_out=call[2]))
    llm.llm.register_forward_hook(lambda *call: seen.update(lm_input=call[1][0], lm_output=call[2][0]))
    result = llm.forward(batch, CPU)
    result["loss"].backward()

    text_frames = torch.arange(batch["text_token"].size(1)) < batch["text_token_len"].unsqueeze(1)
    lm_frames = torch.arange(data["lm_target"].size(1)) < data["lm_input_len"].unsqueeze(1)
    for key, frames in (("text_encoder_out", text_frames), ("text_affine_out", text_frames), ("lm_input", lm_frames),
                        ("lm_output", lm_frames)):  # fmt: skip
        assert_close(seen[key][frames], data[key][frames], atol=5e-5, rtol=1e-4)
    target = llm.targets(batch["text_token_len"], batch["speech_token"], batch["speech_token_len"])
    assert torch.equal(target, data["lm_target"])
    with torch.no_grad():
        logits = llm.llm_decoder(seen["lm_output"])
    assert_close(logits[..., ::16][lm_frames], data["logits_strided"][lm_frames], atol=5e-5, rtol=1e-4)
    assert_close(logits[0, :3], data["logits_row0"], atol=5e-5, rtol=1e-4)
    assert_close(result["loss"], data["loss"], atol=1e-4)
    assert torch.equal(result["acc"], data["acc"].to(result["acc"].dtype))
    assert_gradients(llm, data, meta(name)["grad_norm_names"])


def assert_gradients(module: torch.nn.Module, data: dict[str, Tensor], names: list[str]) -> None:
    parameters = dict(module.named_parameters())
    norms = torch.stack([parameters[name].grad.double().norm() for name in names])
    assert_close(norms, data["grad_norm_values"], rtol=1e-3, atol=1e-5)
    for key, expected in data.items():
        if key.startswith("grad/"):
            assert_close(parameters[key.removeprefix("grad/")].grad, expected, rtol=1e-3, atol=1e-5)


def inputs(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of `inference` of a recorded case."""
    names = ("text", "prompt_text", "prompt_speech_token")
    lengths = {f"{name}_len": torch.tensor([data[name].size(1)]) for name in names}
    return {name: data[name] for name in (*names, "embedding")} | lengths


def speaking(prepared: bool) -> TransformerLM:
    llm = tiny("llm")
    if prepared:
        llm.prepare_decoding("float32")
    return llm


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", cases("llm_infer_*"))
@torch.inference_mode()
def test_parity_step_by_step(name: str, prepared: bool) -> None:
    data, llm = arrays(name), speaking(prepared)
    seen = {}
    llm.text_encoder.register_forward_hook(lambda *call: seen.update(text_encoder_out=call[2][0]))
    llm.text_encoder_affine_layer.register_forward_hook(lambda *call: seen.update(text_affine_out=call[2]))
    lm_input = llm.inference_prefix(data["text"], data["prompt_text"], data["prompt_speech_token"], data["embedding"])
    assert_close(lm_input, data["first_lm_input"], atol=5e-5)
    for key, value in seen.items():
        assert_close(value, data[key], atol=5e-5)
    assert_close(llm.llm.forward_chunk(lm_input, llm.llm.new_cache()), data["first_lm_output"], atol=5e-5)
    cache = llm.llm.new_cache()
    for step, token in enumerate([*data["forced_tokens"].tolist(), None]):
        log_p = llm.next_log_probabilities(lm_input, cache)
        if data["ignore_eos_flags"][step]:  # recorded after the end token was forbidden, or before: compare the rest
            log_p, expected = log_p[:-1], data["logp"][step, :-1]
        else:
            expected = data["logp"][step]
        assert_close(log_p, expected, atol=1e-4)
        if token is not None:
            lm_input = llm.speech_embedding.weight[token].view(1, 1, -1)
    if "final_att_cache" in data:
        frames = data["final_att_cache"].size(2)
        ours = torch.cat([torch.cat((part.keys, part.values), dim=-1)[:, :, :frames] for part in cache])
        assert_close(ours, data["final_att_cache"], atol=5e-5)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", cases("llm_infer_*"))
def test_parity_sampled_tokens(name: str, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, llm = arrays(name), speaking(prepared)
    draws = []
    multinomial = Tensor.multinomial
    monkeypatch.setattr(Tensor, "multinomial", lambda p, *a, **k: noted(draws, p, multinomial(p, *a, **k)))
    arguments = inputs(data)
    for seed in meta(name)["sampled"]:
        draws.clear()
        torch.manual_seed(int(seed))
        tokens = list(llm.inference(**arguments))
        assert tokens == data[f"sampled/{seed}/tokens"].tolist()
        assert [size for size, _ in draws] == data[f"sampled/{seed}/draw_size"].tolist()
        assert [index for _, index in draws] == data[f"sampled/{seed}/draw_index"].tolist()
    torch.manual_seed(meta(name)["ratio_seed"])
    assert list(llm.inference(**arguments, **meta(name)["ratio"])) == data["ratio_tokens"].tolist()
    assert all(torch.equal(arguments[key], value) for key, value in inputs(data).items()), "inputs were changed"


def noted(draws: list, probabilities: Tensor, drawn: Tensor) -> Tensor:
    draws.append((probabilities.numel(), int(drawn)))
    return drawn


def test_loss_ignores_padding() -> None:
    """An item alone gives the same loss as padded to twice its length."""
    torch.manual_seed(0)
    llm: TransformerLM = tiny("llm")
    batch = {
        "text_token": torch.randint(0, 100, (1, 4)),
        "text_token_len": torch.tensor([4]),
        "speech_token": torch.randint(0, llm.speech_token_size, (1, 9)),
        "speech_token_len": torch.tensor([9]),
        "embedding": torch.randn(1, 192),
    }
    padded = batch | {key: torch.nn.functional.pad(batch[key], (0, 5)) for key in ("text_token", "speech_token")}
    with torch.no_grad():
        assert_close(llm.forward(padded, CPU)["loss"], llm.forward(batch, CPU)["loss"], atol=1e-5)
    target = llm.targets(batch["text_token_len"], batch["speech_token"], batch["speech_token_len"])
    assert int((target == IGNORE_ID).sum()) == 2 + 4  # start and speaker, then the text
