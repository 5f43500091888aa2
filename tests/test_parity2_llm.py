"""CosyVoice2's language model against the recorded numbers: training, preferences, decoding, text that arrives."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import tiny2
from parity import V2, assert_close
from torch import Tensor, nn

from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.utils.losses import DPOLoss

CPU = torch.device("cpu")
END, UNUSED, FILL = 6561, 6562, 6563


@pytest.fixture
def llm() -> Qwen2LM:
    return tiny2("llm")


def batch_of(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("batch/"): value for key, value in data.items() if key.startswith("batch/")}


def assert_gradients(module: nn.Module, data: dict[str, Tensor], names: list[str], prefix: str = "") -> None:
    parameters = dict(module.named_parameters())
    norms = torch.stack([parameters[name].grad.double().norm() for name in names])
    assert_close(norms, data[f"{prefix}grad_norm_values"], rtol=2e-3, atol=1e-5)
    for key, expected in data.items():
        if key.startswith(f"{prefix}grad/"):
            assert_close(parameters[key.removeprefix(f"{prefix}grad/")].grad, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", V2.cases("llm_train_*"))
def test_parity2_training(llm: Qwen2LM, name: str) -> None:
    data, seen = V2.arrays(name), {}
    batch = batch_of(data)
    llm.llm.register_forward_hook(lambda *call: seen.update(lm_input=call[1][0], lm_output=call[2]))
    random.seed(V2.meta(name)["seed"])
    result = llm.forward(batch, CPU)
    result["loss"].backward()

    assert_close(seen["lm_input"], data["lm_input"], atol=5e-5)
    read, target = llm.join(batch | {"bistream": data["bistream"]}, CPU)
    assert torch.equal(target, data["lm_target"]) and torch.equal(read, seen["lm_input"])
    frames = torch.arange(target.size(1)) < data["lm_input_len"].unsqueeze(1)
    assert_close(seen["lm_output"][frames], data["lm_output"][frames], atol=5e-5, rtol=1e-4)
    with torch.no_grad():
        logits = llm.llm_decoder(seen["lm_output"])
    assert_close(logits[..., ::32][frames], data["logits_strided"][frames], atol=5e-5, rtol=1e-4)
    assert_close(logits[..., -3:][frames], data["logits_special"][frames], atol=5e-5, rtol=1e-4)
    assert_close(result["loss"], data["loss"], atol=1e-4)
    assert torch.equal(result["acc"], data["acc"].to(result["acc"].dtype))
    assert_gradients(llm, data, V2.meta(name)["grad_norm_names"])


@pytest.mark.parametrize("name", V2.cases("llm_train_*"))
@torch.no_grad()
def test_parity2_each_clip_has_the_loss_that_it_has_alone(llm: Qwen2LM, name: str) -> None:
    data = V2.arrays(name)
    batch = batch_of(data) | {"bistream": data["bistream"]}
    losses, _ = llm.clip_losses(batch, CPU)
    tokens = (data["lm_target"] != -1).sum(dim=1)
    assert_close((losses * tokens).sum() / tokens.sum(), data["loss"], atol=1e-4)
    alone = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(losses))]
    assert_close(losses, torch.stack([llm.forward(clip, CPU)["loss"] for clip in alone]), atol=1e-5)


def log_probabilities(result: dict[str, Tensor]) -> list[Tensor]:
    return [result["chosen_logps"], result["rejected_logps"]]


@pytest.mark.parametrize("name", V2.cases("llm_dpo_*"))
def test_parity2_preference_training(llm: Qwen2LM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts are those recorded: there, the two versions of a clip need not have the same."""
    data, meta = V2.arrays(name), V2.meta(name)
    batch, prefix = batch_of(data), "right/"
    random.seed(meta["seed"])
    lengths = torch.cat((batch["speech_token_len"], batch["reject_speech_token_len"])).tolist()
    layouts = torch.tensor(llm.turns.draw(0.5, batch["text_token_len"].repeat(2).tolist(), lengths))
    doubled = Qwen2LM.doubled
    monkeypatch.setattr(Qwen2LM, "doubled", lambda llm, batch: doubled(llm, batch) | {"bistream": layouts})
    assert torch.equal(llm.join(llm.doubled(batch), CPU)[1], data["lm_target"])

    policy = llm.forward_dpo(batch, CPU)
    judge = copy.deepcopy(llm)
    with torch.no_grad():
        judge.llm_decoder.weight.mul_(0.9)
        reference = judge.forward_dpo(batch, CPU)
    loss, chosen_reward, rejected_reward = DPOLoss(meta["beta"], meta["label_smoothing"])(
        *log_probabilities(policy), *log_probabilities(reference)
    )
    for key, value in (
        ("sft_loss", policy["loss"]),
        (f"{prefix}chosen_logps", policy["chosen_logps"]),
        (f"{prefix}rejected_logps", policy["rejected_logps"]),
        (f"{prefix}reference_chosen_logps", reference["chosen_logps"]),
        (f"{prefix}reference_rejected_logps", reference["rejected_logps"]),
        (f"{prefix}dpo_loss", loss),
        (f"{prefix}chosen_reward", chosen_reward),
        (f"{prefix}rejected_reward", rejected_reward),
        (f"{prefix}total_loss", loss + policy["loss"]),
    ):
        assert_close(value, data[key], atol=1e-4)
    assert torch.equal(policy["acc"], data["acc"].to(policy["acc"].dtype))
    (loss + policy["loss"]).backward()
    assert_gradients(llm, data, meta["grad_norm_names"], prefix)


@pytest.mark.parametrize("setting", [(0.01, 0.0, False), (0.3, 0.1, False), (0.2, 0.0, True)])
def test_parity2_preference_loss(setting: tuple[float, float, bool]) -> None:
    data = V2.arrays("dpo_loss")
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    found = DPOLoss(*setting)(*(data[name] for name in names))
    prefix = "beta{}_smooth{}_ipo{}".format(*setting)
    for value, name in zip(found, ("loss", "chosen_reward", "rejected_reward"), strict=True):
        assert_close(value, data[f"{prefix}/{name}"], atol=1e-6)


def speaking(prepared: bool) -> Qwen2LM:
    llm = tiny2("llm")
    if prepared:
        llm.prepare_decoding("float32")
    return llm


@pytest.fixture
def as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public model forbids the end token alone, which shifts the probabilities of all others."""
    sample = Qwen2LM.sample

    def laxer(llm: Qwen2LM, log_p: Tensor, tokens: list[int], forbidden: range, sampling: int) -> int:
        return sample(llm, log_p, tokens, [END] if END in forbidden else [], sampling)

    monkeypatch.setattr(Qwen2LM, "sample", laxer)


def inputs(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of `inference` of a recorded case."""
    names = ("text", "prompt_text", "prompt_speech_token")
    lengths = {f"{name}_len": torch.tensor([data[name].size(1)]) for name in names}
    return {name: data[name] for name in (*names, "embedding")} | lengths


def assert_scores(log_p: Tensor, data: dict[str, Tensor], step: int) -> None:
    """Compare with what was recorded at a step, except for special tokens that were forbidden there, or are here."""
    stride = len(log_p) // data["logp_strided"].size(1)
    special, recorded = log_p[END:], data["logp_special"][step]
    compared = special.isfinite() & recorded.isfinite()
    assert_close(special[compared], recorded[compared], atol=1e-4)
    assert_close(log_p[:END:stride], data["logp_strided"][step][: len(log_p[:END:stride])], atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", V2.cases("llm_infer_*"))
@torch.inference_mode()
def test_parity2_step_by_step(name: str, prepared: bool) -> None:
    data, llm = V2.arrays(name), speaking(prepared)
    lm_input = llm.inference_prefix(data["text"], data["prompt_text"], data["prompt_speech_token"], data["embedding"])
    assert_close(lm_input, data["first_lm_input"], atol=5e-5)
    assert_close(llm.llm.forward_chunk(lm_input, llm.llm.new_cache()), data["first_lm_output"], atol=5e-5)
    cache = llm.llm.new_cache()
    for step, token in enumerate([*data["forced_tokens"].tolist(), None]):
        log_p = llm.next_log_probabilities(lm_input, cache)
        assert_scores(log_p, data, step)
        if "logp" in data:
            assert_close(log_p[:END], data["logp"][step, :END], atol=1e-4)
        if token is not None:
            lm_input = llm.speech_embedding.weight[token].view(1, 1, -1)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", V2.cases("llm_infer_*"))
@pytest.mark.usefixtures("as_recorded")
def test_parity2_sampled_tokens(name: str, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, llm, draws = V2.arrays(name), speaking(prepared), []
    multinomial = Tensor.multinomial

    def noted(probabilities: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn = multinomial(probabilities, *arguments, **options)
        draws.append((probabilities.numel(), int(drawn)))
        return drawn

    monkeypatch.setattr(Tensor, "multinomial", noted)
    arguments = inputs(data)
    for seed in V2.meta(name)["sampled"]:
        draws.clear()
        torch.manual_seed(int(seed))
        assert list(llm.inference(**arguments)) == data[f"sampled/{seed}/tokens"].tolist()
        assert [size for size, _ in draws] == data[f"sampled/{seed}/draw_size"].tolist()
        assert [index for _, index in draws] == data[f"sampled/{seed}/draw_index"].tolist()
    torch.manual_seed(V2.meta(name)["ratio_seed"])
    assert list(llm.inference(**arguments, **V2.meta(name)["ratio"])) == data["ratio_tokens"].tolist()
    assert all(torch.equal(arguments[key], value) for key, value in inputs(data).items()), "inputs were changed"


@pytest.mark.parametrize("name", V2.cases("llm_infer_*"))
def test_parity2_stops(llm: Qwen2LM, name: str) -> None:
    """Whatever special token the sampler answers with ends the speech; without one the ratio to the text does."""
    arguments = inputs(V2.arrays(name))
    (recorded,) = V2.table("llm_stops").values()
    case = name.removeprefix("llm_infer_")
    expected = {key.removeprefix(f"{case}/"): count for key, count in recorded.items() if key.startswith(f"{case}/")}
    found = {}
    for token in (END, UNUSED, FILL):
        for step in (0, 3, 14):
            llm.sampling = lambda _scores, tokens, _, at=step, stop=token: stop if len(tokens) == at else 7
            found[f"returns_{token}_at_{step}"] = len(list(llm.inference(**arguments)))
    llm.sampling = lambda *_: 7
    found["never_stops"] = len(list(llm.inference(**arguments)))
    found["never_stops_ratio_2.9"] = len(list(llm.inference(**arguments, max_token_text_ratio=2.9)))
    assert found == expected


def pieces(data: dict[str, Tensor]) -> Iterator[Tensor]:
    sizes = data["piece_sizes"].tolist()
    yield from data["text"].split(sizes, dim=1)


def bistream_inputs(data: dict[str, Tensor]) -> dict[str, Any]:
    arguments = inputs(data) | {"text": pieces(data)}
    del arguments["text_len"]
    return arguments


COMPLETE = [name for name in V2.cases("llm_bistream_*") if not name.endswith("leftover")]  # the other is a fault


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", COMPLETE)
def test_parity2_scripted_bistream(name: str, prepared: bool) -> None:
    data, meta, llm = V2.arrays(name), V2.meta(name), speaking(prepared)
    lengths, calls, last = [], [], []
    forward_chunk = llm.llm.forward_chunk
    llm.llm.forward_chunk = lambda xs, cache: lengths.append(xs.size(1)) or forward_chunk(xs, cache)

    def scripted(log_p: Tensor, tokens: list[int], _sampling: int) -> int:
        call = len(calls)
        assert_scores(log_p, data, call)
        calls.append(int(log_p[:END].argmax()))
        if log_p[END].isfinite():
            last.append(call)
        if len(last) > meta["tail"]:
            return END
        return FILL if call in data["fill_at_calls"].tolist() else int(data["forced_tokens"][call])

    llm.sampling = scripted
    arguments = bistream_inputs(data)
    assert list(llm.inference_bistream(**arguments)) == data["tokens"].tolist()
    assert lengths == data["network_lengths"].tolist()
    speech = data["argmax"] < END
    assert torch.equal(torch.tensor(calls)[speech], data["argmax"][speech])
    del arguments["text"]
    assert all(torch.equal(value, inputs(data)[key]) for key, value in arguments.items()), "inputs were changed"


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.usefixtures("as_recorded")
def test_parity2_sampled_bistream(llm: Qwen2LM, name: str) -> None:
    """Where the public model ended in an error, the tokens before it are compared."""
    data = V2.arrays(name)
    for seed, recorded in V2.meta(name)["sampled"].items():
        torch.manual_seed(int(seed))
        tokens = list(llm.inference_bistream(**bistream_inputs(data)))
        expected = data[f"sampled/{seed}/tokens"].tolist()
        assert tokens[: len(expected)] == expected
        assert recorded["error"] or tokens == expected
