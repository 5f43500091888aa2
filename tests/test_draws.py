"""Utterances draw from generators of their own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.hifigan.source import SineGen
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.draws import Draws, generator
from cosyvoice.utils.common import most_probable, nucleus_sampling, random_sampling

LOG_P = torch.zeros(1000)


def drawn() -> list[int]:
    return [nucleus_sampling(LOG_P, 0.9, 900), random_sampling(LOG_P, [], 0)]


def test_they_are_those_of_torchs_generator_with_that_seed() -> None:
    seed_all(3, 4)
    expected = [drawn() for _ in range(3)]
    draws, found = Draws(3, 4), []
    before = torch.get_rng_state()
    for _ in range(3):
        with draws:
            found.append(drawn())
        torch.rand(7, generator=generator())  # others draw in between, from torch's own
    assert found == expected
    torch.set_rng_state(before)
    assert generator() is None


def test_blocks_nest() -> None:
    outer, inner = Draws(1), Draws(2)
    with outer:
        with inner, outer:
            assert generator() is outer.generator
        assert generator() is outer.generator


def test_threads_do_not_disturb_each_other() -> None:
    start = threading.Barrier(4)

    def work(seed: int) -> list[list[int]]:
        start.wait()
        draws, found = Draws(seed), []
        for _ in range(200):
            with draws:
                found.append(drawn())
            torch.rand(1)
        return found

    alone = []
    for seed in range(4):
        with Draws(seed):
            alone.append([drawn() for _ in range(200)])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == alone


@pytest.mark.parametrize("source", ["flow", "vocoder"])
def test_flow_and_vocoder_draw_from_them_too(source: str) -> None:
    def noise() -> torch.Tensor:
        if source == "flow":
            return ConditionalCFM.draw_noise(None, torch.zeros(1, 80, 5))
        return SineGen(22050, 8, 0.1, 0.003, 10).draw(torch.full((1, 1, 50), 100.0))[1]

    with Draws(1):
        first = noise()
    torch.rand(3)
    with Draws(1):
        assert torch.equal(noise(), first)
    with Draws(2):
        assert not torch.equal(noise(), first)


@pytest.mark.parametrize("levels", [2, 5, 40, 10**6])
@pytest.mark.parametrize("count", [1, 25, 99, 100, 200])
def test_the_most_probable_are_what_a_stable_sort_begins_with(levels: int, count: int) -> None:
    """With many ties, with some, and with none."""
    for seed in range(20):
        scores = torch.randint(levels, (100,), generator=torch.Generator().manual_seed(seed)) / levels
        expected, ids = (whole[:count] for whole in scores.sort(descending=True, stable=True))
        found = most_probable(scores, count)
        assert torch.equal(found[0], expected) and torch.equal(found[1], ids)
