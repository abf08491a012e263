"""The benchmarks' own instruments measure what they say, and every command ends in a table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kernels
import scorer
from benchmarks import autoflow, compare, measuring, memory, speed, worker
from benchmarks.measuring import CHAINS, AllocationRecorder
from model import PyramidFlowConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
KIB = 1024
TINY = {  # two stacks: memory saving has nothing to save in one
    "fnf": PyramidFlowConfig(encoder="none", num_level=4, num_stack=2, num_channel=4, image_size=(32, 32)),
    "res18": PyramidFlowConfig(encoder="resnet18", num_level=2, num_stack=2, image_size=(64, 64)),
}


@pytest.fixture
def tiny_models(monkeypatch):
    monkeypatch.setattr(measuring, "DEFAULT_MODELS", TINY)
    monkeypatch.setattr(scorer, "CPU_BATCH_ELEMENTS", 2**13)  # images of an inference: few


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines]


# -------------------------------------------------------------------------------- instruments


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


def test_gradients_of_weights_are_no_activations():
    layer = nn.Linear(100, 100, bias=False)
    x = torch.randn(1, 100)
    assert measuring.step_memory(lambda: layer(x).sum().backward(), layer, CPU) < layer.weight.nbytes


def test_steps_take_turns_after_a_round_that_warms_up():
    calls = []
    times = measuring.interleaved_times({n: lambda n=n: calls.append(n) for n in "ab"}, 3, CPU)
    assert calls == list("abababab")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert all(s >= 0 for seconds in times.values() for s in seconds)
    assert measuring.median_ratio([1, 4, 9], [1, 2, 3]) == 2


def test_all_chains_compute_the_same():
    torch.manual_seed(0)
    networks = [autoflow.coupling_network(8) for _ in range(3)]
    x = torch.randn(1, 8, 6, 6)
    reference = autoflow.build_chain("SequentialNet", networks, (8, 6, 6))(x)
    for name in ("SequentialNF", "checkpoint"):
        torch.testing.assert_close(autoflow.build_chain(name, networks, (8, 6, 6))(x), reference)
    cat = x
    for network in networks:
        block = autoflow.CatCoupling(network)
        torch.testing.assert_close(block.inverse(block(cat)), cat)
        cat = block(cat)  # the peers' blocks swap the halves each time
    torch.testing.assert_close(torch.cat(cat.chunk(2, dim=1)[::-1], dim=1), reference)


def test_the_floor_is_the_official_programs_convolutions():
    """Per image and stack at L=4, C=16, 256x256: 7.3 billion multiply-adds."""
    config = PyramidFlowConfig(encoder="none", image_size=(256, 256))
    shapes = list(speed.official_convolutions(config))
    assert len(shapes) == 4 * 4 * 2
    work = sum(49 * i * o * h * w for i, o, (h, w) in shapes)
    assert work / 4 == pytest.approx(7.29e9, rel=0.01)


# ------------------------------------------------------------------------------ where it goes


def test_a_record_is_replaced_only_where_that_is_asked_for(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(measuring, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(autoflow, "peer_table", lambda *_: "a table")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_main(autoflow.main, ["--gpu", "cpu"])[0] == 0
    folders = sorted(p for p in tmp_path.iterdir())
    assert len(folders) == 2
    assert all(f.name.startswith("benchmark-") for f in folders)
    code, out, _ = run_main(autoflow.main, ["--gpu", "cpu", "--record"])
    assert code == 0
    text = (tmp_path / "records" / "autoflow-cpu.md").read_text()
    assert text in out
    assert "python -m benchmarks.script --gpu cpu --record`" in text.splitlines()[0]
    assert "torch" in text.splitlines()[1]
    code, _, err = run_main(autoflow.main, ["--record", "--out", "x"])
    assert (code, err.count("\n")) == (2, 1)


def test_a_folder_that_cannot_be_written_to(tmp_path, run_main):
    (tmp_path / "file").touch()
    code, _, err = run_main(autoflow.main, ["--gpu", "cpu", "--out", tmp_path / "file" / "x"])
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot write to --out" in err


@pytest.mark.parametrize("flag", ["--maxStacks", "--repeats"])
def test_nothing_is_measured_zero_times(tmp_path, run_main, flag):
    code, _, err = run_main(memory.main, [flag, 0, "--out", tmp_path / "out"])
    assert code == 2
    assert "not a whole number from 1" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (speed.main, ["precision"], "needs --checkpoint and --datapath"),
        (speed.main, ["epoch", "--datapath", "x"], "needs --cls"),
        (speed.main, ["step", "--model", "vgg"], "invalid choice"),
        (compare.main, ["no_such_tree"], "no train.py"),
    ],
)
def test_bad_flags(run_main, main, arguments, message):
    code, _, err = run_main(main, arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


# ----------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("tiny_models")
def test_the_table_of_steps(tmp_path, run_main):
    flags = ["--model", "fnf", "res18", "--repeats", 1, "--gpu", "cpu", "--out", tmp_path]
    code, out, err = run_main(speed.main, ["step", *flags])
    assert code == 0, err
    for name in ("fnf", "res18"):
        text = (tmp_path / f"step-{name}-cpu.md").read_text()
        assert text in out
        rows = cells(text)[1:]
        assert [row[:2] for row in rows] == [[p, s] for p in ("fp32", "bf16") for s in ("on", "off")]
        assert rows[1][4] == "1.00"
        assert int(rows[0][5]) <= int(rows[1][5])
        assert all(float(x) > 0 for row in rows for x in (row[2], row[3], row[6]))


@pytest.mark.usefixtures("tiny_models")
def test_the_table_of_banks(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(speed, "NUM_TEMPLATES", (1, 3))
    code, _, err = run_main(speed.main, ["bank", "--repeats", 1, "--gpu", "cpu", "--out", tmp_path])
    assert code == 0, err
    (path,) = tmp_path.glob("*.md")
    rows = [line.split("|")[1:-1] for line in path.read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["templates", "paper", "1", "3"]
    assert float(rows[1][2]) == 1
    assert int(rows[3][4]) >= int(rows[1][4])


@pytest.mark.usefixtures("tiny_models")
def test_an_epoch_by_its_parts(tmp_path, run_main, monkeypatch):
    for name in ("NUM_TRAIN", "NUM_TEST_GOOD", "NUM_TEST_DEFECTIVE"):
        monkeypatch.setattr(speed, name, 4)
    monkeypatch.setattr(speed, "GENERATED_SIDE", 128)
    small = ["--imageSize", "64", "--numStack", "1", "--numLayer", "2"]
    monkeypatch.setattr(speed, "EPOCH_FLAGS", small)
    flags = ["--model", "fnf", "res18", "--precision", "fp32", "bf16", "--gpu", "cpu", "--out", tmp_path]
    code, _, err = run_main(speed.main, ["epoch", *flags])
    assert code == 0, err
    for model in ("fnf", "res18"):
        header, *rows = cells((tmp_path / f"epoch-{model}-cpu.md").read_text())
        assert header == ["part", "fp32", "bf16"]
        assert [row[0] for row in rows] == ["training", "template", "test", "metrics", "whole epoch"]
        for column in (1, 2):
            parts = [float(row[column]) for row in rows]
            assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.03)


def test_precisions_on_a_trained_state(tmp_path, run_main, trained, monkeypatch):
    monkeypatch.setattr(kernels, "convolution_dtype", lambda asked, *_: asked)  # however few channels there are
    flags = ["--checkpoint", trained.checkpoint, "--datapath", trained.data, "--gpu", "cpu"]
    code, _, err = run_main(speed.main, ["precision", *flags, "--out", tmp_path])
    assert code == 0, err
    fp32, bf16 = cells((tmp_path / "precision-fnf-cpu.md").read_text())[1:]
    assert float(fp32[2]) < 1e-4 < float(bf16[2]) < 0.1


def test_the_memory_of_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(memory, "FIG5_CONFIG", TINY["fnf"])
    peaks = {chain: memory.measure(chain, 4, CPU)[0] for chain in CHAINS}
    assert 0 < peaks["SequentialNF"] < peaks["SequentialNet"]


def test_the_memory_table_states_the_ratio_and_the_papers_numbers(tmp_path):
    rows = {2: dict.fromkeys(CHAINS, (100.0, 5.0)), 16: dict.fromkeys(CHAINS, (104.0, 5.0))}
    table = memory.memory_table(rows)
    assert "| 2 | 100 / 5 |" in table
    assert "| 3.17 / 7.03 |" in table
    on_cuda = memory.memory_table({2: dict.fromkeys(CHAINS, (100.0, None))})
    assert "| 2 | 100 | 100 |" in on_cuda
    assert "at 2 stacks: 1.040" in table
    memory.save_picture(tmp_path / "memory.png", rows)
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_a_case_that_fails_is_named(monkeypatch):
    with pytest.raises(memory.InputError, match=r"none with 1 stacks failed .*KeyError.* --maxStacks"):
        memory.measure_in_own_process("none", 1, "cpu")


def test_peers_that_are_missing_have_a_row(monkeypatch):
    for name, value in (("CHANNELS", 8), ("DEPTH", 2), ("SIDE", 8)):
        monkeypatch.setattr(autoflow, name, value)
    monkeypatch.setitem(sys.modules, "memcnn", None)
    rows = {row[0]: row for row in cells(autoflow.peer_table(1, CPU))[1:]}
    assert list(rows) == list(autoflow.PEERS)
    assert rows["SequentialNet"][3] == "1.00"
    assert float(rows["SequentialNF"][5]) < 1e-3
    assert rows["memcnn"][2].startswith("failed: ModuleNotFoundError")


@pytest.mark.usefixtures("tiny_models")
def test_a_tree_is_compared_with_itself(tmp_path, run_main, monkeypatch):
    """Each side is a process of its own, which imports from its tree."""
    monkeypatch.setattr(compare, "JOBS", ("inference",))
    tree = tmp_path / "tree"
    (tree / "benchmarks").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        (tree / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    config = f"DEFAULT_MODELS['fnf'] = PyramidFlowConfig(**{TINY['fnf'].to_dict()})"
    for name, line in (("benchmarks/measuring.py", config), ("scorer.py", "CPU_BATCH_ELEMENTS = 2**13")):
        with (tree / name).open("a") as file:
            file.write(f"\n\n{line}\n")
    monkeypatch.setattr(compare, "HERE", tree)
    flags = ["--model", "fnf", "--repeats", 2, "--gpu", "cpu", "--out", tmp_path / "out"]
    code, _, err = run_main(compare.main, [tree, *flags])
    assert code == 0, err
    rows = cells((tmp_path / "out" / "compare-cpu.md").read_text())[1:]
    assert [row[:2] for row in rows] == [["fnf", "inference"]]
    assert all(float(x) > 0 for row in rows for x in row[2:5])


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("job", compare.JOBS)
def test_each_job_of_a_comparison_can_be_done_again(job):
    run, count = worker.present_job("fnf", job, "fp32", CPU)
    run()
    run()
    assert count == 1  # by so many images its seconds are divided; the tiny models' batches have one


def test_a_tree_that_cannot_do_the_job(tmp_path, run_main, monkeypatch):
    """It is asked first; the other one, which would take its time, is stopped."""
    (tmp_path / "train.py").touch()
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(start(*args, **options)) or started[-1]
    )
    code, _, err = run_main(compare.main, [tmp_path, "--gpu", "cpu", "--out", tmp_path / "out"])
    assert code == 2
    assert "failed as said above" in err.splitlines()[-1]
    assert len(started) == 2
    assert all(process.poll() for process in started)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_gpu_script_says_what_it_needs(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", ["", "benchmarks.memory"])
def test_the_gpu_script_runs_what_it_says(tmp_path, run_main, monkeypatch, fails):
    """With an interpreter that only writes down what it is asked for; every command then has valid flags."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\necho "$@" >> {log}\n[ "$2" != "{fails}" ]\n')
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": str(stub)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == bool(fails)
    assert ("failed or cut off: benchmarks.memory" in done.stderr) == bool(fails)
    first, *others = [line.split() for line in log.read_text().splitlines()]
    assert first[1:3] == ["pytest", "tests/test_cuda.py"]
    asked = []
    monkeypatch.setattr(speed, "measure_steps", lambda args, _: asked.extend(("step", m) for m in args.model))
    monkeypatch.setattr(speed, "measure_epochs", lambda args, _: asked.extend(("epoch", m) for m in args.model))
    for name in ("measure_in_own_process", "measure"):  # the latter on CUDA
        monkeypatch.setattr(memory, name, lambda *_: asked.append("memory") or (1.0, 1.0))
    for _, module, *arguments in others:
        main = {"benchmarks.speed": speed.main, "benchmarks.memory": memory.main}[module]
        code, _, err = run_main(main, arguments)
        assert code == 0, err
    pairs = [(what, model) for what in ("step", "epoch") for model in ("fnf", "res18")]
    assert asked == [*pairs, *["memory"] * 15]
