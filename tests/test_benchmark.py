"""The benchmark's own instruments measure what they say."""

import pytest
import torch

import benchmark
from benchmark import AllocationRecorder, Memory, build_peer, coupling_network

KIB = 1024


def test_the_recorder_sees_the_highest_level_of_living_tensors():
    with AllocationRecorder() as recorder:
        a = torch.zeros(KIB, dtype=torch.uint8)
        b = torch.zeros(2 * KIB, dtype=torch.uint8)
        del a
        c = torch.zeros(4 * KIB, dtype=torch.uint8)
        c[:10].add_(1)  # a view, in place: nothing new
        d = c.reshape(2, -1)
        del b, c
    assert recorder.peak(without=[]) == 6 * KIB
    assert recorder.peak(without=[d]) == 3 * KIB


def test_the_recorder_sees_activations_of_plain_autograd():
    x = torch.zeros(KIB, requires_grad=True)
    with AllocationRecorder() as recorder:
        y = x
        for _ in range(10):
            y = y.exp()  # keeps its result
        y.sum().backward()
    assert recorder.peak(without=[]) >= 10 * 4 * KIB


def test_all_chains_compute_the_same(monkeypatch):
    monkeypatch.setattr(benchmark, "CHANNELS", 8)
    torch.manual_seed(0)
    networks = [coupling_network() for _ in range(3)]
    x = torch.randn(1, 8, 6, 6)
    reference = build_peer("SequentialNet", networks)(x)
    for name in ("SequentialNF", "checkpoint"):
        torch.testing.assert_close(build_peer(name, networks)(x), reference)
    cat = x
    for network in networks:
        cat = benchmark.CatCoupling(network)(cat)  # the peers' blocks swap the halves each time
    torch.testing.assert_close(torch.cat(cat.chunk(2, dim=1)[::-1], dim=1), reference)


def test_the_memory_table_states_the_ratio_and_the_papers_numbers():
    row = {chain: Memory(100.0, 10.0, 5.0) for chain in benchmark.CHAINS}
    deep = {chain: Memory(104.0, 10.0, 5.0) for chain in benchmark.CHAINS}
    table = benchmark.memory_table({2: row, 16: deep})
    assert "| 2 | 100 / 10 / 5 |" in table
    assert "| 3.17 / 7.03 |" in table
    assert "at 2 stacks: 1.040" in table


@pytest.mark.parametrize("flag", ["--maxStacks", "--repeats"])
def test_nothing_is_measured_zero_times(tmp_path, run_main, flag):
    code, _, err = run_main(benchmark.main, ["memory", flag, 0, "--out", tmp_path / "out"])
    assert code == 2
    assert "not a whole number from 1" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
