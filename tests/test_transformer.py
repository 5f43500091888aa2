"""Attention stacks beyond the recorded ones: the convolution module, and what a head's weights tell."""

import pytest
import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.attention import position_scores
from cosyvoice.transformer.convnext import ConvNeXtBlock
from cosyvoice.transformer.convolution import ConvolutionModule
from cosyvoice.transformer.embedding import relative_positions
from cosyvoice.transformer.encoder import BaseEncoder, ConformerEncoder, TransformerEncoder
from cosyvoice.utils.mask import mask_of_new_frames, subsequent_chunk_mask
from matcha.models.components.past import KeyValueCache

WIDTH, HEADS, KERNEL = 8, 2, 5
LENGTHS = torch.tensor([11, 6])


def small(kind: type[BaseEncoder], **options: object) -> BaseEncoder:
    torch.manual_seed(0)
    return kind(WIDTH, WIDTH, HEADS, linear_units=16, num_blocks=2, **options).eval()


def convolving(**options: object) -> BaseEncoder:
    return small(ConformerEncoder, use_cnn_module=True, cnn_module_kernel=KERNEL, **options)


def frames() -> Tensor:
    return torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(1))


def test_the_names_of_a_block_with_convolution() -> None:
    added = convolving().encoders[0].state_dict().keys() - small(ConformerEncoder).encoders[0].state_dict().keys()
    modules = {name.rpartition(".")[0] for name in added}
    convolutions = {f"conv_module.{name}" for name in ("pointwise_conv1", "depthwise_conv", "norm", "pointwise_conv2")}
    assert modules == convolutions | {"norm_conv", "norm_final"}
    assert convolving().encoders[0].conv_module.depthwise_conv.weight.shape == (WIDTH, 1, KERNEL)


def test_the_convolution_by_its_definition() -> None:
    """Frame by frame and tap by tap."""
    module = ConvolutionModule(3, KERNEL)
    x = torch.randn(1, 7, 3)
    valid = torch.arange(7).view(1, 1, 7) < 5
    one, two = module.pointwise_conv1, module.pointwise_conv2
    both = x[0] @ one.weight.squeeze(-1).T + one.bias
    gated = both[:, :3] * torch.sigmoid(both[:, 3:])
    taps, half = module.depthwise_conv.weight.squeeze(1), KERNEL // 2
    expected = []
    for t in range(7):
        seen = [s for s in range(max(0, t - half), t + half + 1) if s < 5]
        mixed = module.depthwise_conv.bias + sum(taps[:, s - t + half] * gated[s] for s in seen)
        normed = module.norm(mixed)
        expected.append(two.weight.squeeze(-1) @ (normed * torch.sigmoid(normed)) + two.bias)
    torch.testing.assert_close(module(x, valid)[0], torch.stack(expected))


@torch.no_grad()
def test_a_block_by_its_parts() -> None:
    encoder, x, lengths = convolving(), frames(), torch.tensor([11, 11])
    layer, mask = encoder.encoders[0], torch.ones(2, 1, 11, dtype=torch.bool)
    pos_emb = encoder.positions(x)
    y = x + layer.self_attn(layer.norm_mha(x), mask, pos_emb)
    y = y + layer.conv_module(layer.norm_conv(y), mask)
    y = y + layer.feed_forward(layer.norm_ff(y))
    torch.testing.assert_close(layer(x, mask, pos_emb), layer.norm_final(y))
    assert torch.equal(encoder(x, lengths)[1], mask)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    encoder, x = convolving(), frames()
    whole, valid = encoder(x, LENGTHS)
    alone, _ = encoder(x[1:, : LENGTHS[1]], LENGTHS[1:])
    torch.testing.assert_close(whole[1:, : LENGTHS[1]], alone)
    assert valid.sum(dim=2).flatten().tolist() == LENGTHS.tolist()


@torch.no_grad()
def test_a_convolution_sees_its_kernel() -> None:
    module, x, valid = ConvolutionModule(WIDTH, KERNEL), frames()[:1], torch.ones(1, 1, 11, dtype=torch.bool)
    changed = x.clone()
    changed[0, 5] += 1
    differs = (module(changed, valid) != module(x, valid)).any(dim=-1).flatten()
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ConformerEncoder, {"static_chunk_size": 1}, "sees ahead, which static_chunk_size 1 forbids"),
        (ConformerEncoder, {"cnn_module_kernel": 4}, "cnn_module_kernel must be odd"),
        (ConformerEncoder, {"cnn_module_norm": "batch_norm"}, "cnn_module_norm=layer_norm only"),
        (TransformerEncoder, {}, "TransformerEncoder implements use_cnn_module=False only"),
    ],
)
def test_convolutions_that_are_not_here_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(kind, use_cnn_module=True, **options)


def test_a_convolution_does_not_go_frame_by_frame() -> None:
    encoder = convolving()
    with pytest.raises(InputError, match="use_cnn_module sees ahead"):
        encoder.forward_chunk(frames()[:1], encoder.new_cache())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_position_scores_meet_their_distance(causal: bool, queries: int) -> None:
    keys = 9
    last = 0 if causal else 1 - keys
    positions = relative_positions(keys - 1, last, WIDTH).view(1, 1, -1, WIDTH)
    query = torch.randn(1, 1, queries, WIDTH)
    found = position_scores(query, positions, keys)[0, 0]
    for i in range(queries):
        at = keys - queries + i  # the last queries of the sequence
        for j in range(at + 1 if causal else keys):
            expected = query[0, 0, i] @ relative_positions(at - j, at - j, WIDTH)[0]
            torch.testing.assert_close(found[i, j], expected, rtol=0, atol=1e-5)


def test_a_convnext_block_without_condition_sees_five_frames_and_with_one_is_moved_by_it() -> None:
    torch.manual_seed(1)
    hidden, conditions = torch.randn(1, 11, 8), torch.randn(2, 4)
    changed = hidden.clone()
    changed[:, 5] += 1
    block = ConvNeXtBlock(8)
    moved = (block(changed) - block(hidden)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [3 <= frame <= 7 for frame in range(11)]
    adapted = ConvNeXtBlock(8, condition_size=4)(hidden.expand(2, -1, -1), conditions)
    assert adapted.shape == (2, 11, 8) and not torch.allclose(adapted[0], adapted[1])


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_new_frames_see_what_they_see_in_the_whole(chunk_size: int) -> None:
    for total in range(1, 10):
        whole = subsequent_chunk_mask(total, chunk_size)
        for new in range(1, total + 1):
            rows = whole[total - new :]
            found = mask_of_new_frames(new, total, chunk_size)
            assert rows.all() if found is None else torch.equal(found[0], rows)


def test_a_cache_keeps_its_rows_while_it_grows() -> None:
    rows = torch.randn(2, 1, 2, 30, 3)
    cache = KeyValueCache(rows[0, :, :, :0], rows[1, :, :, :0])
    for new in (4, 1, 7, 0, 18):
        first = cache.length
        keys, values = cache.append(*rows[:, :, :, first : first + new])
        assert torch.equal(keys, rows[0, :, :, : first + new]) and torch.equal(values, rows[1, :, :, : first + new])
        assert first + new == cache.length <= cache.capacity
    cache.length = 5
    keys, _ = cache.append(*rows[:, :, :, :2])
    assert torch.equal(keys, torch.cat([rows[0, :, :, :5], rows[0, :, :, :2]], dim=2))
