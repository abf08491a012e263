"""The benchmark's own instruments measure what they say."""

import pytest
import torch

import benchmark
import benchmark_autoflow
import benchmark_speed
from benchmark_autoflow import CHAINS, CatCoupling, Memory, build_peer, coupling_network, memory_table
from measuring import AllocationRecorder
from model import PyramidFlowConfig

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
    monkeypatch.setattr(benchmark_autoflow, "CHANNELS", 8)
    torch.manual_seed(0)
    networks = [coupling_network() for _ in range(3)]
    x = torch.randn(1, 8, 6, 6)
    reference = build_peer("SequentialNet", networks)(x)
    for name in ("SequentialNF", "checkpoint"):
        torch.testing.assert_close(build_peer(name, networks)(x), reference)
    cat = x
    for network in networks:
        cat = CatCoupling(network)(cat)  # the peers' blocks swap the halves each time
    torch.testing.assert_close(torch.cat(cat.chunk(2, dim=1)[::-1], dim=1), reference)


def test_the_memory_table_states_the_ratio_and_the_papers_numbers():
    row = {chain: Memory(100.0, 10.0, 5.0) for chain in CHAINS}
    deep = {chain: Memory(104.0, 10.0, 5.0) for chain in CHAINS}
    table = memory_table({2: row, 16: deep})
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


TINY = {  # two stacks: memory saving has nothing to save in one
    "fnf": PyramidFlowConfig(
        encoder="none", num_level=4, num_stack=2, num_channel=4, image_size=(32, 32)
    ),
    "res18": PyramidFlowConfig(encoder="resnet18", num_level=2, num_stack=2, image_size=(64, 64)),
}


@pytest.fixture
def tiny_models(monkeypatch):
    for module in (benchmark_speed, benchmark):
        monkeypatch.setattr(module, "DEFAULT_MODELS", TINY)


def cells(text):
    return [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")
    ]


@pytest.mark.usefixtures("tiny_models")
def test_the_table_of_steps(tmp_path, run_main):
    code, out, err = run_main(
        benchmark.main,
        ["step", "--model", "fnf", "res18", "--repeats", 2, "--gpu", "cpu", "--out", tmp_path],
    )
    assert code == 0, err
    for name in ("fnf", "res18"):
        text = (tmp_path / f"step-{name}-cpu.md").read_text()
        assert text in out
        rows = cells(text)[1:]
        assert [row[:2] for row in rows] == [[p, s] for p in ("fp32", "bf16") for s in ("on", "off")]
        assert rows[1][4] == "1.00"
        assert int(rows[0][5]) <= int(rows[1][5])
        assert all(float(x) > 0 for row in rows for x in (row[2], row[3], row[6]))


def test_the_floor_is_the_official_programs_convolutions():
    """Per image and stack at L=4, C=16, 256x256: 7.3 billion multiply-adds."""
    config = PyramidFlowConfig(encoder="none", image_size=(256, 256))
    shapes = list(benchmark_speed.official_convolutions(config))
    assert len(shapes) == 4 * 4 * 2
    work = sum(49 * i * o * h * w for i, o, (h, w) in shapes)
    assert work / 4 == pytest.approx(7.29e9, rel=0.01)


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("model", ["fnf", "res18"])
def test_an_epoch_by_its_parts(tmp_path, run_main, trained, monkeypatch, model):
    for name in ("NUM_TRAIN", "NUM_TEST_GOOD", "NUM_TEST_DEFECTIVE"):
        monkeypatch.setattr(benchmark_speed, name, 4)
    monkeypatch.setattr(benchmark_speed, "GENERATED_SIDE", 128)
    monkeypatch.setattr(
        benchmark_speed, "EPOCH_FLAGS", ["--imageSize", "64", "--numStack", "1", "--numLayer", "2"]
    )
    code, _, err = run_main(
        benchmark.main, ["epoch", "--model", model, "--gpu", "cpu", "--out", tmp_path]
    )
    assert code == 0, err
    rows = cells((tmp_path / f"epoch-{model}-cpu.md").read_text())[1:]
    assert [row[0] for row in rows] == ["training", "template", "test", "metrics", "whole epoch"]
    parts = [float(row[1]) for row in rows]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.03)


def test_precisions_on_a_trained_state(tmp_path, run_main, trained):
    code, _, err = run_main(
        benchmark.main,
        ["precision", "--checkpoint", trained.checkpoint, "--datapath", trained.data, "--gpu", "cpu",
         "--out", tmp_path],
    )  # fmt: skip
    assert code == 0, err
    fp32, bf16 = cells((tmp_path / "precision-fnf-cpu.md").read_text())[1:]
    assert float(fp32[2]) < 1e-4 < float(bf16[2]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["precision"], "needs --checkpoint and --datapath"),
        (["epoch", "--datapath", "x"], "needs --cls"),
        (["step", "--model", "vgg"], "invalid choice"),
    ],
)
def test_bad_flags(run_main, arguments, message):
    code, _, err = run_main(benchmark.main, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
