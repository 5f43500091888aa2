"""From parquet rows to batches: tokens and mel stay together, epochs are shuffled anew."""

import pytest
import torch

from cosyvoice.utils.frames import Rates
from dataset import Clip, EpochOrder, collate, crop_windows, to_clip

RATES = [Rates(22050, 256, 50), Rates(24000, 480, 25)]


def counting(tokens: int, rates: Rates) -> Clip:
    """Its tokens and its mel count themselves, so that a window tells where it was cut."""
    mel = torch.arange(rates.mel_frames(tokens), dtype=torch.float32)[:, None].expand(-1, 80)
    return Clip(str(tokens), "ann", torch.zeros(1, dtype=torch.int64), torch.arange(tokens), mel, torch.zeros(192))


@pytest.mark.parametrize("rates", RATES)
def test_a_window_is_of_one_place_in_tokens_and_mel(rates: Rates) -> None:
    torch.manual_seed(0)
    batch, starts = collate([counting(tokens, rates) for tokens in (200, 90, 30)]), set()
    for _ in range(20):
        seen = []
        for clips, window in crop_windows(batch, 100, rates):
            assert window["speech_token_len"].tolist() == [window["speech_token"].size(1)] * len(clips)
            for tokens, mel in zip(window["speech_token"], window["speech_feat"], strict=True):
                start = int(tokens[0])
                assert torch.equal(tokens, start + torch.arange(len(tokens)))
                assert torch.equal(mel[:, 0], rates.mel_frames(start) + torch.arange(len(mel)).float())
                assert len(mel) == rates.mel_frames(len(tokens)) <= 100
                starts.add(start)
            seen += clips
        assert sorted(seen) == [0, 1, 2]
    assert len(starts) > 20 and max(starts) > 100


@pytest.mark.parametrize("rates", RATES)
def test_a_clip_ends_where_tokens_and_mel_both_end(rates: Rates) -> None:
    row = {"utt": "1", "spk": "ann", "utt_embedding": [0.0] * 192, "text_token": [1]}
    for tokens, frames in ((10, 12), (7, 30), (8, 13)):
        mel = torch.arange(frames * 80.0)
        shaped = {"speech_feat": mel.tolist(), "speech_feat_shape": [frames, 80]}
        clip = to_clip(row | shaped | {"speech_token": [*range(tokens)]}, rates)
        assert clip.speech_token.tolist() == [*range(min(tokens, rates.whole_tokens(frames)))]
        assert torch.equal(clip.mel, mel.view(frames, 80)[: rates.mel_frames(len(clip.speech_token))])


def test_every_epoch_has_an_order_of_its_own() -> None:
    order, other = EpochOrder(20, seed=1), EpochOrder(20, seed=2)
    orders = []
    for epoch in range(3):
        order.set_epoch(epoch)
        orders.append(list(order))
    assert all(sorted(each) == list(range(20)) for each in orders)
    assert len({tuple(each) for each in (*orders, list(other))}) == 4
