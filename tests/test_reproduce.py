"""reproduce.py trains what is missing, shares what is equal, survives failures, and computes tables right."""

import csv
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, make_class

import jobs
import reproduce
from jobs import Job, Machines, run_jobs, slurm_parameters
from metrics import METRIC_NAMES
from util import lock

TINY = ["--imageSize", 32, "--numLayer", 2, "--numStack", 1, "--numChannel", 4, "--kernelSize", 3,
        "--gpu", "cpu", "--precision", "fp32"]  # fmt: skip


def arguments(tmp_path, table, *extra):
    return [
        table,
        "--datapath",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--epochs",
        1,
        *extra,
        "--",
        *TINY,
    ]


def fill(folder, pixel, pro, best=None):
    """The result of a finished training."""
    run = folder / "run"
    run.mkdir(parents=True)
    row = {**dict.fromkeys(METRIC_NAMES, 0.5), "epoch": 3, "pixel_auroc": pixel, "pixel_pro": pro}
    better = {**row, "epoch": 2, "pixel_auroc": best or pixel, "pixel_pro": best or pro}
    names = ("best_pixel_auroc", "best_pixel_pro", "best_image_auroc")
    (run / "result.json").write_text(json.dumps({"last": row, **dict.fromkeys(names, better)}))


def commands(run_main, given):
    code, out, err = run_main(reproduce.main, [given[0], "--dryRun", *given[1:]])
    assert code == 0, err
    return out.splitlines()


def folder_of(command):
    return command.split("--saveDir ")[1]


def test_real_jobs_fill_a_table_and_are_not_run_again(tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)  # jobs find the program wherever they are started
    make_class(tmp_path / "data", "capsule")
    given = arguments(tmp_path, "table1", "--classes", "capsule", "--jobs", 2)
    code, out, err = run_main(reproduce.main, given)
    assert code == 0, err + out
    assert "[2/2]" in out
    text = (tmp_path / "out" / "table1" / "table.md").read_text()
    assert "### CVN" in text
    assert "### SVN" in text
    rows = list(csv.DictReader((tmp_path / "out" / "table1" / "results.csv").open()))
    assert [(r["variant"], r["choice"]) for r in rows] == [
        (norm, choice)
        for norm in ("CVN", "SVN")
        for choice in ("last", "best pixel AUROC", "best PRO", "best image AUROC")
    ]
    ours = 100 * float(rows[0]["pixel_auroc"])
    assert f"| capsule | {ours:.1f} |" in text
    assert f"| 96.1 | 93.1 | {ours - 96.1:+.1f} |" in text

    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "jobs").rglob("last.pt")}
    code, out, _ = run_main(reproduce.main, given)
    assert code == 0
    assert "2 trainings, 2 of them finished already" in out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "jobs").rglob("last.pt")} == finished


def test_a_job_that_fails_is_tried_twice_reported_and_made_up_for_later(tmp_path, run_main):
    make_class(tmp_path / "data", "capsule")
    broken = make_class(tmp_path / "data", "pill") / "train" / "good" / "001.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    given = arguments(tmp_path, "table1", "--classes", "capsule", "pill", "--fig7")
    lines = commands(run_main, given)
    for command in lines:
        if "SVN" in command or "capsule" in command:
            fill(tmp_path / folder_of(command), 0.9, 0.8)
    code, out, _ = run_main(reproduce.main, given)
    assert code == 1
    assert out.count("CVN, pill, seed 0 starts") == 2
    assert "CVN, pill, seed 0 failed, once more" in out
    (log,) = {line.split("see ")[1].rstrip(")") for line in out.splitlines() if "failed (see" in line}
    assert "cannot read image" in Path(log).read_text()
    text = (tmp_path / "out" / "table1" / "table.md").read_text()
    assert "| pill | failed | failed |" in text
    assert log in text
    assert "| capsule | 90.0 | 80.0 |" in text
    rows = list(csv.DictReader((tmp_path / "out" / "table1" / "results.csv").open()))
    assert [r["folder"] for r in rows if r["choice"] == "failed"] == [log]

    broken.write_bytes(whole)
    code, out, _ = run_main(reproduce.main, given)
    assert code == 0
    assert "4 trainings, 3 of them finished already" in out
    assert "failed" not in (tmp_path / "out" / "table1" / "table.md").read_text()


def test_a_killed_job_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The first try kills itself after the first epoch; the second resumes."""
    make_class(tmp_path / "data")
    flags = [*map(str, SMALL), "--epochs", "3", "--datapath", str(tmp_path / "data")]
    job = Job("a job", flags, tmp_path / "job")
    original = Job.command
    script = (
        "import os, sys, train; original = train.Training.evaluate\n"
        "def evaluate(training, clock):\n"
        "    if (n := len(list(os.scandir(sys.argv[-1])))) and os.path.exists(sys.argv[-1] + '/once'):\n"
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    open(sys.argv[-1] + '/once', 'w').close(); return original(training, clock)\n"
        "train.Training.evaluate = evaluate; train.main(sys.argv[1:])"
    )

    def command(job):
        line = original(job)
        return [sys.executable, "-c", script, *line[2:]] if "--saveDir" in line else line

    monkeypatch.setattr(Job, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(jobs.ROOT))
    told = []
    failed = run_jobs([job], Machines(), tmp_path / "submitit", lambda job, what: told.append(what))
    assert not failed, job.log.read_text()
    assert told == ["starts", "failed, once more", "starts", "done"]
    assert "going on with" in job.log.read_text()
    assert len(list((tmp_path / "job").glob("*/result.json"))) == 1


def test_equal_trainings_are_one_job(tmp_path, run_main):
    """SVN is carpet's own normalization: Table 1's SVN column and Table 2's baseline share it."""
    for name in ("carpet", "zipper"):
        make_class(tmp_path / "data", name)
    table1 = commands(run_main, arguments(tmp_path, "table1", "--classes", "carpet", "zipper"))
    table2 = commands(run_main, arguments(tmp_path, "table2", "--classes", "carpet", "zipper"))
    first, second = ({folder_of(command) for command in table} for table in (table1, table2))
    assert (len(first), len(second)) == (4, 10)
    shared = first & second
    assert sorted(path.split("/")[-1].split("-")[0] for path in shared) == ["carpet", "zipper"]


@pytest.mark.parametrize("seeds", [[0], [3, 4, 7]])
def test_means_and_deviations(tmp_path, run_main, seeds):
    classes = ["tile", "wood", "screw"]
    for name in classes:
        make_class(tmp_path / "data", name)
    given = arguments(tmp_path, "table3", "--encoder", "none", "--classes", *classes, "--seeds", *seeds)
    values = {}
    for i, command in enumerate(commands(run_main, given)):
        words = command.split()
        key = words[words.index("--cls") + 1], int(words[words.index("--seed") + 1])
        values[key] = 0.9 + 0.001 * i
        fill(tmp_path / folder_of(command), values[key], values[key] - 0.1, best=0.99)
    assert run_main(reproduce.main, given)[0] == 0
    text = (tmp_path / "out" / "table3" / "table.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    tile = [100 * values["tile", s] for s in seeds]
    shown = f"{statistics.mean(tile):.1f}" + (
        f" ± {statistics.stdev(tile):.1f}" if len(seeds) > 1 else ""
    )
    assert f"| tile | {shown} |" in rows["tile"]
    assert "| 99.0" in rows["tile"]
    assert f"| 97.9 | 95.8 | {statistics.mean(tile) - 97.9:+.1f} |" in rows["tile"]
    by_seed = [100 * statistics.mean(values[c, s] for c in classes) for s in seeds]
    shown = f"{statistics.mean(by_seed):.1f}" + (
        f" ± {statistics.stdev(by_seed):.1f}" if len(seeds) > 1 else ""
    )
    assert f"| mean of 3 | {shown} |" in rows["mean of 3"]
    paper = (97.9 + 93.8 + 94.0) / 3
    assert f"| {paper:.1f} |" in rows["mean of 3"]


def test_groups_of_classes():
    table = reproduce.tables()["table3"]
    names = dict(reproduce.groups(table))
    assert [len(classes) for classes in names.values()] == [12, 15, 5, 10]
    few = reproduce.Table("x", ("tile", "wood"), table.variants)
    assert reproduce.groups(few) == [("mean of 2", ("tile", "wood"))]


def test_every_number_of_the_papers_tables_is_found():
    for name, table in reproduce.tables().items():
        for variant in table.variants:
            paper = reproduce.read_paper(variant)
            for cls in table.classes:
                assert set(table.columns.values()) <= paper[cls].keys(), (name, variant.name, cls)
    fnf, res18 = reproduce.tables()["table3"].variants
    for variant, pixel, pro in ((fnf, 95.5, 94.0), (res18, 96.8, 95.9)):
        paper = reproduce.read_paper(variant)
        assert statistics.mean(row["pixel_auroc"] for row in paper.values()) == pytest.approx(
            pixel, abs=0.06
        )
        assert statistics.mean(row["pro"] for row in paper.values()) == pytest.approx(pro, abs=0.06)


def test_machines():
    assert Machines().places(9) == [None]
    assert Machines(jobs=3).places(9) == [None] * 3
    assert Machines(gpus=("2", "3")).places(9) == ["2", "3"]
    assert Machines(gpus=("0", "1"), jobs=4).places(9) == ["0", "1", "0", "1"]
    assert Machines(gpus=("0",), slurm={}).places(9) == [None] * 9
    assert Machines(jobs=4, slurm={}).places(9) == [None] * 4
    assert slurm_parameters({"partition": "gpu", "time": "60"}) == {
        "timeout_min": 60,
        "slurm_partition": "gpu",
    }


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_stops_the_running_jobs(tmp_path, monkeypatch, handler):
    """Also in a shell's background, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, handler)
    job = Job("a job", [], tmp_path / "job")
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", script])

    interrupted = []

    def interrupt(seconds):
        if not interrupted and job.log.is_file() and job.log.read_text().endswith("\n"):
            interrupted.append(True)
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([job], Machines(), tmp_path / "submitit", lambda job, what: None)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    training, deadline = int(job.log.read_text()), time.monotonic() + 60
    while Path(f"/proc/{training}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{training}").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["table1"], "lacks pill, toothbrush, carpet, grid, zipper (it has capsule)"),
        (["table1", "--classes", "bolt"], "lacks bolt"),
        (["table1", "--classes", "capsule", "--encoder", "resnet18"], "no part with --encoder resnet18"),
        (["table9"], "invalid choice"),
        (["table1", "--slurm", "gpu"], "write KEY=VALUE"),
        (["table1", "--slurm", "time=long"], "a number of minutes"),
        (["table1", "--classes", "capsule", "--", "--gpu", "0"], "CUDA_VISIBLE_DEVICES"),
        (["table1", "--classes", "capsule", "--", "--volumeNorm", "CVN"], "the table sets it itself"),
        (["table1", "--classes", "capsule", "--", "--seed", "3"], "the table sets it itself"),
        (["table1", "--classes", "capsule", "--", "--epochz", "3"], "unrecognized arguments: --epochz"),
        (["table1", "--classes", "capsule", "--", "--imageSize", "30"], "nearest sizes that work"),
    ],
)
def test_bad_flags(tmp_path, run_main, extra, message):
    make_class(tmp_path / "data", "capsule")
    given = [extra[0], "--datapath", tmp_path / "data", "--out", tmp_path / "out", *extra[1:]]
    code, _, err = run_main(reproduce.main, given)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_without_submitit_the_package_is_named(tmp_path, run_main, monkeypatch):
    make_class(tmp_path / "data", "capsule")
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = run_main(reproduce.main, arguments(tmp_path, "table1", "--classes", "capsule"))
    assert code == 2
    assert "needs the package submitit: pip install submitit" in err


def test_two_at_once_do_not_work_in_one_folder(tmp_path, run_main):
    make_class(tmp_path / "data", "capsule")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("a") as file:
        assert lock(file)
        code, _, err = run_main(reproduce.main, arguments(tmp_path, "table1", "--classes", "capsule"))
    assert code == 2
    assert "another reproduce.py works in" in err


def test_a_cluster_that_is_not_there_is_said(tmp_path, run_main, monkeypatch):
    make_class(tmp_path / "data", "capsule")
    monkeypatch.setenv("PATH", str(tmp_path))
    given = arguments(tmp_path, "table1", "--classes", "capsule", "--slurm", "partition=gpu")
    code, _, err = run_main(reproduce.main, given)
    assert (code, err.count("\n")) == (2, 1), err
    assert "--slurm: " in err
