"""Batches made on a stream of their own are whole when they are used, and stay so until they have been."""

import pytest
import torch

from nnunetv2_dermomamba.augmentation.beside import AHEAD, Beside

pytestmark = pytest.mark.gpu
CYCLES = 20_000_000  # about 10 ms
SIZE = 1 << 22


def test_batches_while_the_consumer_is_slow():
    """Each is dropped as soon as its use is queued, so that the next could be given its memory."""
    beside = Beside(torch.device("cuda"))
    sums = []
    for number in range(12):
        batch = beside(lambda n=number: {"data": torch.full((SIZE,), n, device="cuda"), "target": [], "keys": ["a"]})
        torch.cuda._sleep(CYCLES)
        sums.append(batch["data"].sum())
    assert [int(s) for s in sums] == [SIZE * n for n in range(12)]


def test_batches_of_a_slow_maker():
    """Used right away, and lists of targets, too."""
    beside = Beside(torch.device("cuda"))

    def make() -> dict:
        target = torch.zeros(SIZE, device="cuda")
        torch.cuda._sleep(CYCLES)
        return {"data": target + 1, "target": [target.add_(2)]}

    for _ in range(4):
        batch = beside(make)
        assert (batch["data"] == 1).all()
        assert (batch["target"][0] == 2).all()


def test_it_does_not_run_far_ahead():
    """Else every batch that waits for its step would have to be in memory."""
    beside = Beside(torch.device("cuda"))
    through = []
    for number in range(8):
        beside(dict)
        assert all(event.query() for event in through[: max(0, number - AHEAD - 1)])
        torch.cuda._sleep(CYCLES)
        through.append(torch.cuda.current_stream().record_event())
    assert not through[-1].query()
