"""reproduce.py trains what is missing, shares what is equal, survives failures, and computes tables right."""

import csv
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, make_class

import jobs
import reproduce
from jobs import Job, Machines, run_jobs, slurm_parameters
from metrics import METRICS
from util import lock

TINY = ["--imageSize", 32, "--numLayer", 2, "--numStack", 1, "--numChannel", 4, "--kernelSize", 3,
        "--gpu", "cpu", "--precision", "fp32"]  # fmt: skip


def arguments(tmp_path, table, *extra):
    return [table, "--datapath", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1, *extra, "--", *TINY]


def fill(folder, pixel, pro, best=None, paper=None):
    """The result of a finished training; `paper` is what one template scores, where a bank was asked for."""
    run = folder / "run"
    run.mkdir(parents=True)
    row = {**dict.fromkeys(METRICS, 0.5), "score": "paper", "epoch": 3}
    last = {**row, "pixel_auroc": pixel, "pixel_pro": pro}
    better = {**row, "epoch": 2, "pixel_auroc": best or pixel, "pixel_pro": best or pro}
    result = {"last": last, **{f"best_{m}": better for m in ("pixel_auroc", "pixel_pro", "image_auroc")}}
    if paper is not None:
        result["last_paper"] = {**row, "pixel_auroc": paper, "pixel_pro": paper}
    (run / "result.json").write_text(json.dumps(result))


def commands(run_main, given):
    code, out, err = run_main(reproduce.main, [given[0], "--dryRun", *given[1:]])
    assert code == 0, err
    return out.splitlines()


def folder_of(command):
    return command.split("--saveDir ")[1]


def test_real_jobs_fill_a_table_and_are_not_run_again(tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)  # jobs find the program wherever they are started
    make_class(tmp_path / "data", "capsule", num_test=1)
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
    assert {(r["score"], r["epoch"]) for r in rows} == {("paper", "1")}
    ours = 100 * float(rows[0]["pixel_auroc"])
    assert f"| capsule | {ours:.1f} |" in text
    assert f"| 96.1 | 93.1 | {ours - 96.1:+.1f} |" in text

    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "jobs").rglob("last.pt")}
    code, out, _ = run_main(reproduce.main, given)
    assert code == 0
    assert "2 trainings, 2 of them finished already" in out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "jobs").rglob("last.pt")} == finished

    cut = next((tmp_path / "out" / "jobs").glob("*/*/result.json"))  # as if the machine had crashed
    whole = cut.read_bytes()
    cut.write_bytes(whole[:100])
    code, out, err = run_main(reproduce.main, given)
    assert code == 0, err + out
    assert "2 trainings, 1 of them finished already" in out
    assert cut.read_bytes() == whole
    assert (tmp_path / "out" / "table1" / "table.md").read_text() == text


def test_a_job_that_fails_is_tried_twice_reported_and_made_up_for_later(tmp_path, run_main):
    make_class(tmp_path / "data", "capsule", num_test=1)
    broken = make_class(tmp_path / "data", "pill", num_test=1) / "train" / "good" / "001.png"
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
    line = next(line for line in out.splitlines() if "failed: " in line)
    reason, log = line.split("failed: ")[1].removesuffix(")").split(" (see ")
    assert reason.startswith("train.py: error: cannot read image")
    assert Path(log).read_text().endswith(reason + "\n")
    text = (tmp_path / "out" / "table1" / "table.md").read_text()
    assert "| pill | failed | failed |" in text
    assert f": {reason} (see {log})" in text
    assert "| capsule | 90.0 | 80.0 |" in text
    rows = list(csv.DictReader((tmp_path / "out" / "table1" / "results.csv").open()))
    assert [r["folder"] for r in rows if r["choice"] == "failed"] == [log]

    broken.write_bytes(whole)
    code, out, _ = run_main(reproduce.main, given)
    assert code == 0
    assert "4 trainings, 3 of them finished already" in out
    assert "failed" not in (tmp_path / "out" / "table1" / "table.md").read_text()


def test_a_killed_job_resumes_where_it_stopped(tmp_path, monkeypatch):
    """The first try kills itself in the second epoch."""
    make_class(tmp_path / "data", num_test=1)
    flags = [*map(str, SMALL), "--epochs", "3", "--datapath", str(tmp_path / "data")]
    job = Job("a job", flags, tmp_path / "job")
    script = (
        "import os, sys, jobs, train; from pathlib import Path; original = train.evaluate\n"
        "once = Path(sys.argv[1]) / 'once'\n"
        "def evaluate(*args):\n"
        "    if once.exists() and '--resume' not in sys.argv:\n"
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    once.touch(); return original(*args)\n"
        "train.evaluate = evaluate; jobs.run_job(jobs.Job('', sys.argv[2:], Path(sys.argv[1])))"
    )
    original = Job.command
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", script, *original(job)[2:]])
    monkeypatch.setenv("PYTHONPATH", str(jobs.ROOT))
    told = []
    failed = run_jobs([job], Machines(), tmp_path / "slurm", lambda job, what: told.append(what))
    assert not failed, job.log.read_text()
    assert told == ["starts", "failed, once more: killed by signal 9", "starts", "done"]
    assert "from epoch 2" in job.log.read_text()
    assert len(list((tmp_path / "job").glob("*/result.json"))) == 1


def test_a_damaged_state_starts_the_job_anew(tmp_path, trained):
    job = Job("a job", ["--cls", "widget"], tmp_path)
    anew = ["--cls", "widget", "--saveDir", str(tmp_path)]
    assert job.training_flags() == anew
    shutil.copytree(trained.run, tmp_path / "run")
    assert job.result()["folder"] == tmp_path / "run"
    state, result = tmp_path / "run" / "state.pt", tmp_path / "run" / "result.json"
    whole = result.read_text()
    wrong = whole.replace('"image_auroc": 1.0', '"image_auroc": "1.0"')
    assert wrong != whole
    for text in ("", "{", "[]", "{}", '{"last": null}', '{"last": {"epoch": 2}}', "\0", wrong):
        result.write_text(text)
        assert job.result() is None
    assert job.training_flags() == ["--resume", str(tmp_path / "run")]
    content = state.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:5000] + b"damaged" + content[5007:]):
        state.write_bytes(damaged)
        assert job.training_flags() == anew


def test_a_training_that_outlived_its_reproduce_is_waited_for(tmp_path):
    """As after `kill -9`: it still holds the lock of its log."""
    job = Job("a job", ["--cls", "nothing"], tmp_path / "job")
    fill(tmp_path, 0.9, 0.8)
    job.folder.mkdir()
    script = (
        "import fcntl, os, time; file = open('output.txt', 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "while not os.path.exists('finish'): time.sleep(0.05)\n"
        "os.rename('../run', 'run')"
    )
    told = []

    def report(job, what):
        told.append(what)
        (job.folder / "finish").touch()

    with subprocess.Popen([sys.executable, "-c", script], cwd=job.folder, stdout=subprocess.PIPE) as orphan:
        orphan.stdout.readline()
        assert job.is_running()
        assert not run_jobs([job], Machines(), tmp_path / "slurm", report)
    assert told == ["is running since an earlier start; waiting for it", "done"]
    assert [path.name for path in job.folder.iterdir() if path.is_dir()] == ["run"]
    assert not job.is_running()
    with (job.folder / "run" / "log.txt").open("w") as file:  # of a train.py --resume, by hand
        assert lock(file)
        assert job.is_running()


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
    shown = f"{statistics.mean(tile):.1f}" + (f" ± {statistics.stdev(tile):.1f}" if len(seeds) > 1 else "")
    assert f"| tile | {shown} |" in rows["tile"]
    assert "| 99.0" in rows["tile"]
    assert f"| 97.9 | 95.8 | {statistics.mean(tile) - 97.9:+.1f} |" in rows["tile"]
    by_seed = [100 * statistics.mean(values[c, s] for c in classes) for s in seeds]
    shown = f"{statistics.mean(by_seed):.1f}" + (f" ± {statistics.stdev(by_seed):.1f}" if len(seeds) > 1 else "")
    assert f"| mean of 3 | {shown} |" in rows["mean of 3"]
    paper = (97.9 + 93.8 + 94.0) / 3
    assert f"| {paper:.1f} |" in rows["mean of 3"]


def test_plus_trains_and_scores_by_one_template_and_by_a_bank(tmp_path, run_main):
    make_class(tmp_path / "data", "screw", num_test=1)
    given = ["plus", "--datapath", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1,
             "--numTemplate", 3, "--", *TINY]  # fmt: skip
    code, _, err = run_main(reproduce.main, given)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out" / "plus" / "results.csv").open()))
    assert [row["score"] for row in rows if row["choice"] == "last"] == ["bank", "paper"]
    assert all(float(row["image_ap"]) >= 0 for row in rows)


def test_plus_compares_the_scores_of_the_same_weights(tmp_path, run_main):
    """Two data sets, epochs by class, pairs of one seed."""
    make_class(tmp_path / "data", "screw")
    make_class(tmp_path / "more", "cookie")
    given = ["plus", "--datapath", tmp_path / "data", tmp_path / "more", "--out", tmp_path / "out",
             "--epochs", 5, "screw=3", "--seeds", 0, 1, "--", "--gpu", "cpu"]  # fmt: skip
    lines = commands(run_main, given)
    assert len(lines) == 4
    for i, line in enumerate(lines):
        name, data, epochs = [("screw", "data", 3), ("cookie", "more", 5)][i // 2]
        for flags in (f"--cls {name} --encoder none", f"--epochs {epochs} ", f"--evalEvery {epochs} ",
                      "--score bank --numTemplate 64 ", f"--seed {i % 2} ",
                      f"--datapath {tmp_path / data} "):  # fmt: skip
            assert flags in line
        assert "--precision" not in line
        fill(tmp_path / folder_of(line), 0.95 + 0.01 * i, 0.9, paper=0.9 + 0.03 * i)
    assert len(commands(run_main, [*given[:-3], "--encoder", "all", *given[-3:]])) == 8
    assert run_main(reproduce.main, given)[0] == 0
    text = (tmp_path / "out" / "plus" / "table.md").read_text()
    assert "| class | score | pixel AUROC | PRO | PRO@0.3 | image AUROC | image AP |" in text
    assert "| screw | published | 94.0 | 94.1 | n/a | n/a | n/a |" in text
    assert "| screw | paper | 91.5 ± 2.1 | 91.5 ± 2.1 | 50.0 ± 0.0 |" in text
    assert "| screw | bank | 95.5 ± 0.7 | 90.0 ± 0.0 |" in text
    assert "| screw | bank - paper | +4.0 ± 1.4 | -1.5 ± 2.1 | +0.0 ± 0.0 |" in text
    assert "| cookie | published" not in text
    assert "| mean of 2 | bank | 96.5 ± 0.7 |" in text
    assert "| mean of 2 | bank - paper | +2.0 ± 1.4 |" in text
    rows = list(csv.DictReader((tmp_path / "out" / "plus" / "results.csv").open()))
    assert [r["choice"] for r in rows[:2]] == ["last", "last"]
    assert [float(r["pixel_auroc"]) for r in rows[:2]] == [0.95, 0.9]


@pytest.mark.parametrize(
    ("capability", "more", "precision"),
    [
        (None, [], "fp32"),
        ((7, 0), [], "fp32"),
        ((9, 0), [], "tf32"),
        ((9, 0), ["--gpu", "cpu"], "fp32"),
        ((9, 0), ["--precision", "bf16"], "bf16"),
    ],
)
def test_tables_are_in_the_official_precision(tmp_path, run_main, monkeypatch, capability, more, precision):
    make_class(tmp_path / "data", "tile")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    given = ["table3", "--datapath", tmp_path / "data", "--classes", "tile", "--encoder", "none"]
    (line,) = commands(run_main, [*given, "--out", tmp_path / "out", "--", *more])
    words = line.split()
    assert words[words.index("--precision") + 1] == precision


def test_groups_of_classes():
    table = reproduce.tables()["table3"]
    sizes = [len(classes) for _, classes in reproduce.groups(table)]
    assert sizes == [1] * 15 + [12, 15, 5, 10]
    few = reproduce.Table("x", ("tile", "wood"), table.variants)
    assert reproduce.groups(few)[2:] == [("mean of 2", ("tile", "wood"))]


def test_every_number_of_the_papers_tables_is_found():
    for name, table in reproduce.tables().items():
        for variant in table.variants if not table.plus else ():
            paper = reproduce.read_paper(variant)
            for cls in table.classes:
                assert set(table.metrics) <= paper[cls].keys(), (name, variant.name, cls)
    fnf, res18 = reproduce.tables()["table3"].variants
    for variant, pixel, pro in ((fnf, 95.5, 94.0), (res18, 96.8, 95.9)):
        paper = reproduce.read_paper(variant)
        for metric, mean in (("pixel_auroc", pixel), ("pixel_pro", pro)):
            values = [paper[name][metric] for name in reproduce.MVTEC_CLASSES]
            assert statistics.mean(values) == pytest.approx(mean, abs=0.06)
    assert reproduce.tables()["plus"].variants[1].paper == res18.paper


def test_machines():
    assert Machines().places(9) == [None]
    assert Machines(jobs=3).places(9) == [None] * 3
    assert Machines(gpus=("2", "3")).places(9) == ["2", "3"]
    assert Machines(gpus=("0", "1"), jobs=4).places(9) == ["0", "1", "0", "1"]
    assert Machines(gpus=("0",), slurm={}).places(9) == [None] * 9
    assert Machines(jobs=4, slurm={}).places(9) == [None] * 4
    assert slurm_parameters({"partition": "gpu", "time": "60"}) == {"timeout_min": 60, "slurm_partition": "gpu"}


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_stops_the_running_jobs_and_prints_one_line(tmp_path, run_main, monkeypatch, handler):
    """Also in a shell's background, where SIGINT is ignored."""
    make_class(tmp_path / "data", "capsule")
    before = signal.signal(signal.SIGINT, handler)
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", script])

    def training():
        texts = [path.read_text() for path in (tmp_path / "out").glob("jobs/*/output.txt")]
        return next((text for text in texts if text.endswith("\n")), None)

    def interrupt(seconds):
        if training():
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=interrupt))
    try:
        given = arguments(tmp_path, "table1", "--classes", "capsule")
        code, _, err = run_main(reproduce.main, given)
        assert (code, err.count("\n")) == (130, 1)
        assert "stopped; the same command again completes what is missing" in err
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path(f"/proc/{int(training())}").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["table1"], "lacks pill, toothbrush, carpet, grid, zipper (it has capsule)"),
        (["table1", "--classes", "bolt"], "lacks bolt"),
        (["table1", "--classes", "capsule", "--encoder", "resnet18"], "no part with --encoder resnet18"),
        (["table9"], "invalid choice"),
        (["table1", "--classes", "capsule", "--epochs", "pill=3"], "--epochs pill=...: not one of the"),
        (["table1", "--epochs", "many"], "not a whole number from 1 on"),
        (["table1", "--slurm", "gpu"], "write KEY=VALUE"),
        (["table1", "--slurm", "time=long"], "write a number of minutes"),
        (["table1", "--classes", "capsule", "--", "--gpu", "0"], "CUDA_VISIBLE_DEVICES"),
        (["table1", "--classes", "capsule", "--", "--volumeNorm", "CVN"], "the table sets it itself"),
        (["table1", "--classes", "capsule", "--", "--seed", "3"], "the table sets it itself"),
        (["plus", "--", "--score", "paper"], "the table sets it itself"),
        (["plus", "--", "--good", "a"], "the table sets it itself"),
        (["plus", "--classes", "untested"], "lacks untested (it has capsule)"),
        (["plus", "--classes", "capsule", "--", "--proLimit", "0.1"], "the table sets it itself"),
        (["table1", "--classes", "capsule", "--", "--epochz", "3"], "unrecognized arguments: --epochz"),
        (["table1", "--classes", "capsule", "--", "--imageSize", "30"], "nearest sizes that work"),
    ],
)
def test_bad_flags(tmp_path, run_main, extra, message):
    make_class(tmp_path / "data", "capsule")
    shutil.rmtree(make_class(tmp_path / "data", "untested") / "test")
    given = [extra[0], "--datapath", tmp_path / "data", "--out", tmp_path / "out", *extra[1:]]
    code, _, err = run_main(reproduce.main, given)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_without_submitit_the_package_is_named(tmp_path, run_main, monkeypatch):
    """And only --slurm needs it."""
    make_class(tmp_path / "data", "capsule")
    monkeypatch.setitem(sys.modules, "submitit", None)
    given = arguments(tmp_path, "table1", "--classes", "capsule", "--slurm", "time=60")
    code, _, err = run_main(reproduce.main, given)
    assert code == 2
    assert "needs the package submitit: pip install submitit" in err


def test_jobs_go_through_submitit(tmp_path, monkeypatch):
    """Its executor for this machine stands for Slurm's."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor
    monkeypatch.setattr(submitit, "AutoExecutor", lambda folder, cluster: executor(folder, "local"))
    fill(tmp_path, 0.9, 0.8)
    job = Job("a job", [], tmp_path / "job")
    script = f"import os; os.rename({str(tmp_path / 'run')!r}, {str(tmp_path / 'job' / 'run')!r})"
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", script])
    told = []
    machines = Machines(slurm={"time": "5"})
    assert not run_jobs([job], machines, tmp_path / "slurm", lambda job, what: told.append(what))
    assert told == ["starts", "done"]


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
