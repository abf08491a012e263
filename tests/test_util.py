"""Errors, flags, devices, precisions, processes and files, as every script relies on them."""

import argparse
import contextlib
import errno
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import util
from util import (
    Clock,
    DivergedError,
    InputError,
    Interrupted,
    Parser,
    StopSignals,
    add_running_flags,
    apply_precision,
    atomic_path,
    boolean,
    check_writable,
    choose_device,
    choose_precision,
    create_run_folder,
    fraction,
    free_memory,
    load_tensors,
    lock,
    markdown_table,
    number,
    percent,
    progress,
    save_tensors,
    start_log,
    whole_number,
    write_csv,
    write_json,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def raising(error):
    def main():
        raise error

    return main


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no\nclass"), 2, "script.py: error: no class"),
        (DivergedError("the loss became nan"), 1, "the loss became nan; checkpoints of earlier epochs"),
        (Interrupted("stopped in epoch 3"), 130, "stopped in epoch 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 2, "out of memory; use smaller images or batches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 2, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 2, "out of memory"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(run_main, error, code, message):
    got, _, err = run_main(raising(error), [])
    assert (got, err.count("\n")) == (code, 1)
    assert message in err


def test_a_bug_is_no_error_of_the_user(run_main):
    with pytest.raises(RuntimeError, match="shapes"):
        run_main(raising(RuntimeError("shapes do not fit")), [])


def test_an_error_without_a_terminal(run_main, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit):
        util.run_script(raising(InputError("no class")))


def test_pillow_is_quiet_and_others_are_not(run_main):
    def main():
        for module in ("PIL.TiffImagePlugin", "numpy"):
            warnings.warn_explicit("odd", UserWarning, "file.py", 1, module)

    with pytest.warns(UserWarning, match="odd") as seen:
        run_main(main, [])
    assert len(seen) == 1


def test_without_stdout_there_is_nothing_to_flush(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    util.run_script(lambda: None)
    with pytest.raises(SystemExit, match="1"):
        util.run_script(raising(OSError(28, "No space left on device")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_output_that_cannot_be_written_is_said_once():
    script = "import util; util.run_script(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=Path(util.__file__).parent, stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_at_once_and_is_remembered(name):
    number_ = getattr(signal, name)
    before = signal.getsignal(number_)
    with StopSignals() as stop:
        stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number_)
        for _ in range(2):  # also where something had swallowed it
            with pytest.raises(KeyboardInterrupt):
                stop.check()
    assert signal.getsignal(number_) == before


def test_a_signal_that_python_swallows_is_remembered_and_not_printed(capsys):
    """What is raised while an object is deleted goes to sys.unraisablehook."""

    class Dying:
        def __init__(self, die):
            self.die = die

        def __del__(self):
            self.die()

    hook = sys.unraisablehook
    with StopSignals() as stop:
        Dying(lambda: signal.raise_signal(signal.SIGTERM))
        assert capsys.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert sys.unraisablehook == hook


def test_a_signal_of_which_a_library_makes_another_error_is_still_one():
    """As matplotlib does, whose C++ says that what it was drawing is invalid."""

    def draw():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("invalid bounding box") from None

    with pytest.raises(KeyboardInterrupt), StopSignals():
        draw()
    with pytest.raises(ValueError, match="without any signal"), StopSignals():
        raise ValueError("without any signal")


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


# -------------------------------------------------------------------------------------- flags


def flags(parser):
    parser.add_argument("--epochs", type=whole_number(1), default=15, help="passes over the data")
    parser.add_argument("--sizes", nargs="+", default=["auto"], help="of images")
    parser.add_argument("--saveMemory", type=boolean, default=True, help="on the way back")
    parser.add_argument("--dry", action="store_true", help="only look")
    parser.add_argument("--resume", help="a folder")
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        (["--epoch=3"], "did you mean --epochs?"),
        (["--savememory", "true"], "did you mean --saveMemory?"),
        (["--zzz"], "unrecognized arguments: --zzz (see --help)"),
        (["extra"], "unrecognized arguments: extra (see --help)"),
        (["--epochs", "3", ""], "unrecognized arguments: (see --help)"),
        (["--epochs", "0"], "'0' is not a whole number from 1 on"),
        (["--saveMemory", "maybe"], "'maybe' is not one of true, 1, yes, false, 0, no"),
    ],
)
def test_flags_are_never_abbreviated_and_errors_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        flags(Parser(prog="x")).parse_args(arguments)
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert message in err


def test_the_first_line_of_an_error():
    assert util.first_line(ValueError("\none\ntwo")) == "one"
    assert util.first_line(ValueError("")) == "ValueError"


@pytest.mark.parametrize("value", [None, True, 3, -(10**17), 0.5, "a"])
def test_values_of_flags(value):
    assert util.is_plain(value)


@pytest.mark.parametrize("value", [[], (), {}, 10**20, b"a", [1]])
def test_values_of_no_flag(value):
    assert not util.is_plain(value)


def test_endless_values_are_shortened(capsys):
    parser = util.Parser(prog="x")
    parser.add_argument("--n", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", "a\nb" * 10**5])
    err = capsys.readouterr().err
    assert len(err) < 600
    assert err.count("\n") == 1


def test_help_shows_defaults_and_the_description_as_written():
    text = flags(Parser(prog="x", description="Commands:\n\n    x --dry")).format_help()
    assert "Commands:\n\n    x --dry" in text
    for shown in ("passes over the data [15]", "of images [auto]", "on the way back [true]"):
        assert shown in text
    assert "only look\n" in text
    assert "a folder\n" in text


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (whole_number(1), {"1": 1, "007": 7}, ["0", "-1", "1.5", "1e3", "", "x", "9" * 19]),
        (whole_number(1, 99), {"99": 99}, ["100"]),
        (number(0), {"0": 0, "2e-4": 2e-4}, ["-1", "nan", "inf", "x", ""]),
        (number(0, above=True), {"1e-9": 1e-9}, ["0", "-0.0"]),
        (fraction, {"0": 0, "0.5": 0.5, "1": 1}, ["1.01", "-0.1"]),
        (boolean, {"True": True, "0": False, "no": False}, ["2", "", "on"]),
    ],
)
def test_types_of_flags(convert, good, bad):
    for text, value in good.items():
        assert convert(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            convert(text)


def test_running_flags():
    parser = Parser()
    add_running_flags(parser)
    args = parser.parse_args([])
    assert (args.gpu, args.precision) == ("0", "auto")
    assert args.numWorkers >= 1


# -------------------------------------------------------------------------- device, precision


@pytest.mark.parametrize(
    ("count", "gpu", "expected"),
    [
        (0, "cpu", CPU),
        (0, "0", CPU),
        (1, "0", torch.device("cuda", 0)),
        (1, "cuda", torch.device("cuda", 0)),
        (4, "cpu", CPU),
        (4, "3", torch.device("cuda", 3)),
        (4, "cuda:1", torch.device("cuda", 1)),
    ],
)
def test_devices(monkeypatch, count, gpu, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert choose_device(gpu) == expected


@pytest.mark.parametrize(
    ("count", "gpu", "have"),
    [
        (0, "1", "none"),
        (0, "cuda", "none"),
        (0, "cuda:0", "none"),
        (1, "1", "only 0"),
        (4, "cuda:4", "0 to 3"),
        (4, "-1", "0 to 3"),
        (4, "cuda:x", "0 to 3"),
        (4, "tpu", "0 to 3"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, count, gpu, have):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(InputError, match=rf"--gpu {gpu}: .*this machine has: {have}.*--gpu cpu"):
        choose_device(gpu)


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("0") == torch.device("cuda", 3)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([], "fp32"),
        (["AVX-512"], "fp32"),
        (["AVX-512", "AVX-512 BF16"], "bf16"),
        (["AVX-512", "AVX-512 BF16", "AMX"], "bf16"),
    ],
)
def test_auto_on_cpus(monkeypatch, features, expected):
    monkeypatch.setattr(util, "cpu_features", lambda: features)
    assert choose_precision("auto", CPU) == expected
    for asked in ("fp32", "bf16"):
        assert choose_precision(asked, CPU) == asked
    with pytest.raises(InputError, match="needs an NVIDIA GPU from Ampere on"):
        choose_precision("tf32", CPU)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_gpus(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == expected
    for asked in ("tf32", "bf16"):
        if capability < (8, 0):
            with pytest.raises(InputError, match=f"{asked} needs .* Ampere"):
                choose_precision(asked, CUDA)
        else:
            assert choose_precision(asked, CUDA) == asked


@pytest.mark.parametrize(
    ("trained_in", "on_cpu", "on_gpu"),
    [("fp32", "fp32", "fp32"), ("tf32", "bf16", "tf32"), ("bf16", "bf16", "bf16"), (None, "bf16", "bf16")],
)
def test_auto_keeps_what_a_model_was_trained_in(monkeypatch, trained_in, on_cpu, on_gpu):
    monkeypatch.setattr(util, "cpu_features", lambda: ["AVX-512 BF16"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_precision("auto", CPU, trained_in) == on_cpu
    assert choose_precision("auto", CUDA, trained_in) == on_gpu
    assert choose_precision("bf16", CPU, trained_in) == "bf16"


def test_fp32_and_tf32_differ_by_cudnns_switch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = True  # what is not the default
    for precision, dtype, switch in (("tf32", None, True), ("fp32", None, False), ("bf16", torch.bfloat16, False)):
        assert apply_precision(precision) == dtype
        assert torch.backends.cudnn.allow_tf32 == switch
        assert not torch.backends.cuda.matmul.allow_tf32


def test_free_memory_heeds_the_limit_of_a_container(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 100 kB", "MemAvailable: 50 kB"],
        "/sys/fs/cgroup/memory.max": ["max"],
        "/sys/fs/cgroup/memory.current": ["1000"],
    }
    monkeypatch.setattr(util, "_read_lines", lambda path: files.get(path, []))
    monkeypatch.setattr(util, "freed_memory", lambda: 0)
    assert free_memory(CPU) == 50 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["11000"]
    assert free_memory(CPU) == 10000
    files["/sys/fs/cgroup/memory.stat"] = ["anon 5", "inactive_file 400"]  # a cache that makes room
    assert free_memory(CPU) == 10400
    files["/sys/fs/cgroup/memory.max"] = ["100"]
    assert free_memory(CPU) == 0
    monkeypatch.setattr(util, "freed_memory", lambda: 7)  # what this process has anyway
    assert free_memory(CPU) == 7
    files.clear()
    assert free_memory(CPU) == 2**32


@pytest.mark.skipif(util.freed_memory() == 0, reason="glibc before 2.33, or another library")
def test_the_memory_of_freed_tensors_is_kept_and_counted():
    """In a process of its own: in one that has run for long, glibc may take a large tensor from the system."""
    program = """
import torch, util
util.keep_freed_memory()
x = torch.ones(2**26)
before = util.freed_memory()
del x
print(util.freed_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(util.__file__).parent, capture_output=True)
    assert int(done.stdout) > 2**27, done.stderr


def test_the_clock_adds_up_its_parts():
    clock = Clock(CPU)
    for name in ("a", "b", "a"):
        with clock.part(name):
            pass
    assert list(clock.seconds) == ["a", "b"]
    assert all(seconds >= 0 for seconds in clock.seconds.values())
    assert str(clock) == "0.0 s (a 0.0, b 0.0)"


# -------------------------------------------------------------------------- several processes


def test_alone_nothing_is_exchanged():
    util.join_processes(CPU)
    assert (util.world_size(), util.rank(), util.is_main()) == (1, 0, True)
    assert util.share(range(5)) == list(range(5))
    assert util.share(range(5), equal=True) == list(range(5))
    module, x = torch.nn.Linear(2, 2), torch.rand(3)
    assert util.data_parallel(module) is module
    assert util.gather(x, 3) is x
    before = x.clone()
    util.total([x])
    util.average([x])
    assert torch.equal(x, before)
    util.leave_processes()


@pytest.mark.parametrize(("rank", "all_items", "equal_items"), [(0, [0, 2, 4], [0, 2]), (1, [1, 3], [1, 3])])
def test_what_two_processes_share(monkeypatch, rank, all_items, equal_items):
    monkeypatch.setattr(util, "world_size", lambda: 2)
    monkeypatch.setattr(util, "rank", lambda: rank)
    assert util.is_main() == (rank == 0)
    assert util.share(range(5)) == all_items
    assert util.share(range(5), equal=True) == equal_items


# -------------------------------------------------------------------------- progress, logs


def test_progress_that_goes_to_a_file_has_no_carriage_returns(capsys, monkeypatch):
    monkeypatch.setattr(util, "LOG_INTERVAL_S", 0)
    assert list(progress(range(3), "epoch 1", 3)) == [0, 1, 2]
    err = capsys.readouterr().err
    assert "epoch 1" in err
    assert "\r" not in err


def test_a_log_says_where_it_runs_and_escapes_what_the_terminal_lacks(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    logs = []
    util.run_script(lambda: logs.append(start_log(tmp_path / "log.txt", ["torch 2"])))
    log = logs[0]
    log.info("class größe")
    with pytest.raises(InputError, match="another process is writing"):
        start_log(tmp_path / "log.txt", [])
    for handler in log.handlers:
        handler.close()
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["torch 2", "class größe"]
    assert terminal.buffer.getvalue() == b"class gr\\xf6\\xdfe\n"


def test_a_table_and_its_percents():
    table = markdown_table(["class", "AUROC"], [["tile", percent(0.98765)], ["wood", percent(None)]])
    assert table == "| class | AUROC |\n|---|---|\n| tile | 98.77 |\n| wood | n/a |"


# -------------------------------------------------------------------------------------- files


def test_run_folders_are_never_shared(tmp_path):
    folders = {create_run_folder(tmp_path, "tile") for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("check", [check_writable, lambda p, flag: create_run_folder(p, "tile", flag)])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, check):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to --out .*file"):
        check(tmp_path / "file" / "x", "--out")


def test_whether_a_folder_can_be_made_is_found_without_making_it(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_locked_for_one(tmp_path):
    path = tmp_path / "log.txt"
    with path.open("w") as first, path.open("w") as second:
        assert lock(first)
        assert not lock(second)
    with path.open("w") as third:
        assert lock(third)


@pytest.mark.parametrize("name", ["last.pt", "x" * 250])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_csv(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": None}, {"x": 2, "y": 0.5}])
    assert (tmp_path / "a.csv").read_text() == "x,y\n1,\n2,0.5\n"


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_tensors_survive_their_file(tmp_path):
    content = {"x": torch.arange(6.0).view(2, 3), "settings": {"lr": 1e-4, "names": ["a", None]}}
    save_tensors(tmp_path / "a.pt", content)
    loaded = load_tensors(tmp_path / "a.pt")
    assert torch.equal(loaded["x"], content["x"])
    assert loaded["settings"] == content["settings"]


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, plain_pickle):
    path, content = tmp_path / "a.pt", {"x": Malice(str(tmp_path / "executed"))}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="cannot be read as tensors and plain values"):
        load_tensors(path)
    assert not (tmp_path / "executed").exists()


def flip_a_weight(path):
    """Change a byte of a tensor, which only the checksum shows."""
    with zipfile.ZipFile(path) as archive:
        data = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    start = content.index(torch.full((100,), 3.0).numpy().tobytes(), data.header_offset)
    content[start] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_weight, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("<html>"), "damaged"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), r"cannot be read \(Too many levels"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage, message):
    path = tmp_path / "a.pt"
    save_tensors(path, {"x": torch.full((100,), 3.0)})
    damage(path)
    with pytest.raises(InputError, match=rf"a\.pt .*{message}"):
        load_tensors(path)


@pytest.mark.parametrize("room", [0, 100, 5_000, 100_000, 1_000_000, 3_990_000])
def test_tensors_on_a_disk_that_is_full_at_any_point_say_so(tmp_path, monkeypatch, room):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    (tmp_path / "a.pt").write_text("as it was")
    monkeypatch.setattr(util, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors(tmp_path / "a.pt", {f"x{i}": torch.zeros(1000) for i in range(1000)})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.pt", "as it was")]


@pytest.mark.parametrize(
    ("lines", "slow"),
    [(["vendor_id\t: AuthenticAMD"], True), (["vendor_id\t: GenuineIntel"], False), ([], False)],
    ids=["AMD", "Intel", "not Linux"],
)
def test_on_which_processors_mkl_is_slow(lines, slow, monkeypatch):
    monkeypatch.setattr(util, "_read_lines", lambda path: lines)
    assert util.mkl_is_slow.__wrapped__() == slow
