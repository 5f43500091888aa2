"""Epochs of a corpus: who gets which files, what is random, and what a missing file says."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing import start_processes

from cosyvoice.dataset.dataset import Dataset
from cosyvoice.dataset.loader import EpochLoader
from cosyvoice.runtime.errors import InputError

FILES = 7


def opened(data: Iterable[dict], mode: str = "train") -> Iterator[dict]:
    """Two samples a file, each with a random number."""
    for sample in data:
        for part in "ab":
            yield {"utt": Path(sample["src"]).name + part, "draw": random.random()}


def batched(data: Iterable[dict], mode: str = "train", gan: bool = False, dpo: bool = False) -> Iterator[dict]:
    for sample in data:
        yield {"utts": [sample["utt"]], "draw": sample["draw"], "gan": gan, "mode": mode}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "data.list"
    path.write_text("".join(f"{empty_file(tmp_path / str(number))}\n" for number in range(FILES)))
    return path


def empty_file(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def dataset(corpus: Path, **options: Any) -> Dataset:
    return Dataset(corpus, [opened, batched], seed=3, **options)


def utterances(batches: Iterable[dict]) -> list[str]:
    return [batch["utts"][0] for batch in batches]


def test_an_epoch_can_be_repeated_and_the_next_one_differs(corpus: Path) -> None:
    loader = EpochLoader(dataset(corpus))
    first = list(loader)
    random.seed(9)
    assert list(loader) == first
    loader.set_epoch(1)
    second = list(loader)
    assert sorted(utterances(first)) == sorted(utterances(second)) and utterances(first) != utterances(second)
    assert not {batch["draw"] for batch in first} & {batch["draw"] for batch in second}


def test_the_pipeline_does_not_disturb_other_random_draws(corpus: Path) -> None:
    random.seed(5)
    expected = [random.random() for _ in range(3)]
    random.seed(5)
    batches = iter(dataset(corpus))
    found = []
    for _ in range(3):
        next(batches)
        found.append(random.random())
    assert found == expected


def test_processes_share_the_files(corpus: Path) -> None:
    shares = []
    for rank in range(3):
        share = dataset(corpus)
        share.set_share(rank, 3)
        shares.append(set(utterances(share)))
    assert sum(len(share) for share in shares) == 2 * FILES == len(set.union(*shares))


def test_two_workers_give_what_two_processes_give(corpus: Path) -> None:
    workers = utterances(EpochLoader(dataset(corpus), num_workers=2, prefetch=2))
    shares = []
    for rank in range(2):
        share = dataset(corpus)
        share.set_share(rank, 2)
        shares.append(utterances(share))
    in_turn = [utt for pair in zip(*shares, strict=False) for utt in pair]
    assert workers[: len(in_turn)] == in_turn
    assert sorted(workers) == sorted(shares[0] + shares[1])


def count_batches(rank: int, corpus: Path) -> None:
    dist.init_process_group("gloo", init_method=corpus.with_name("meeting").as_uri(), rank=rank, world_size=2)
    loader = EpochLoader(dataset(corpus))
    corpus.with_name(f"{rank}.txt").write_text(f"{len(list(loader))} {len(list(loader))}")
    dist.destroy_process_group()


def test_processes_end_an_epoch_together(corpus: Path) -> None:
    """Of seven files one process has four, the other three: neither waits for a batch that the other lacks."""
    start_processes(count_batches, args=(corpus,), nprocs=2, start_method="forkserver")
    fewest = 2 * (FILES // 2)
    assert [corpus.with_name(f"{rank}.txt").read_text() for rank in range(2)] == [f"{fewest} {fewest}"] * 2


def test_without_partition_and_shuffle_everyone_gets_all_in_order(corpus: Path) -> None:
    held_out = dataset(corpus, mode="dev", gan=True, shuffle=False, partition=False)
    held_out.set_share(1, 2)
    loader = EpochLoader(held_out)
    first = list(held_out)
    assert utterances(first) == [f"{number}{part}" for number in range(FILES) for part in "ab"]
    assert all(batch["gan"] and batch["mode"] == "dev" for batch in first)
    loader.set_epoch(4)
    assert list(loader) == first


def test_a_resumed_epoch_leaves_out_what_was_seen(corpus: Path) -> None:
    loader = EpochLoader(dataset(corpus))
    whole = list(loader)
    loader.skip = 5
    assert list(loader) == whole[5:]
    assert list(loader) == whole


def test_a_list_may_name_folders_with_blanks(corpus: Path) -> None:
    files = [str(empty_file(corpus.with_name("my corpus") / name)) for name in "01"]
    corpus.write_text("\n".join(files))
    assert dataset(corpus).files == files


def test_mistakes(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 parquet file.* for 8 processes"):
        dataset(corpus).set_share(0, 8)
    with pytest.raises(InputError, match="missing.list does not exist"):
        dataset(tmp_path / "missing.list")
    (tmp_path / "empty.list").write_text("\n")
    with pytest.raises(InputError, match="lists no parquet file"):
        dataset(tmp_path / "empty.list")
    (tmp_path / "parquet.tar").write_bytes(b"PAR1\xff")
    with pytest.raises(InputError, match="parquet.tar is not UTF-8.* or give the data.list"):
        dataset(tmp_path / "parquet.tar")
    with pytest.raises(InputError, match="no utterance of .* can be trained on"):
        list(EpochLoader(Dataset(corpus, [lambda data, mode: iter(()), batched])))


def test_a_worker_reports_a_mistake_in_one_line(corpus: Path) -> None:
    def unreadable(data: Iterable[dict], mode: str) -> Iterator[dict]:
        raise InputError("0 is not a readable parquet file; make it again")
        yield

    with pytest.raises(InputError) as caught:
        list(EpochLoader(Dataset(corpus, [unreadable, batched]), num_workers=1, prefetch=1))
    assert str(caught.value) == "0 is not a readable parquet file; make it again"
