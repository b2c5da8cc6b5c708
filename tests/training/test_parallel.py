"""What ranks exchange, and activation checkpointing."""

import os
import socket

import pytest
import torch
from torch import nn

import toy_training as toy
from palate.training import parallel
from palate.training.parallel import World


def exchange(rank: int, port: int, queue) -> None:
    """What each of three ranks sees."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)

    def worker(config: str, world: World) -> None:
        tensors = [torch.full((2,), float(rank)), torch.full((1, 3), 10.0 * rank)]
        world.sum_(tensors)
        world.barrier()
        gathered = world.gather({"rank": rank, "text": "ü" * (5 * rank)})
        queue.put(
            (rank, world.size, world.main, [t.tolist() for t in tensors], gathered, world.broadcast(config * rank))
        )

    parallel.run_torchrun(worker, "x")


@pytest.fixture(scope="module")
def seen():
    queue = toy.FORKS.Queue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [toy.FORKS.Process(target=exchange, args=(rank, port, queue)) for rank in range(3)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return found


def test_every_rank_sees_the_sums_and_what_all_said(seen):
    for rank, (number, size, main, tensors, gathered, said) in enumerate(seen):
        assert (number, size, main) == (rank, 3, rank == 0)
        assert tensors == [[3.0, 3.0], [[30.0, 30.0, 30.0]]]
        assert gathered == [{"rank": r, "text": "ü" * (5 * r)} for r in range(3)]
        assert said == ""  # rank 0's, not their own


def test_one_process_alone_needs_no_group():
    world = World.current()
    assert (world.rank, world.size, world.main) == (0, 1, True)
    tensor = torch.ones(2)
    world.sum_([tensor])
    world.barrier()
    assert tensor.tolist() == [1, 1]
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert parallel.local_rows(torch.zeros(5, 2)) == (0, 5)


def test_activation_checkpointing_keeps_gradients_and_saves_memory():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 8)) for _ in range(3))
        )

    def gradients(model):
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(1)
        x = torch.randn(16, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters()], saved

    plain, other = build(), build()
    parallel.checkpoint_activations(other)
    expected, kept = gradients(plain)
    found, kept_less = gradients(other)
    assert all(map(torch.equal, found, expected))  # dropout draws the same numbers again
    assert kept_less < kept / 5
