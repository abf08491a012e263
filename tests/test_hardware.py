"""What `auto` stands for on a machine, and that memory is looked at before it is taken."""

import pytest
import torch

import hardware
from hardware import Clock, apply_precision, choose_device, choose_precision, free_memory
from util import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    monkeypatch.setattr(hardware, "cpu_features", lambda: features)
    assert choose_precision("auto", CPU) == expected
    for asked in ("fp32", "bf16"):
        assert choose_precision(asked, CPU) == asked
    with pytest.raises(InputError, match="needs an NVIDIA GPU from Ampere on"):
        choose_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_on_gpus(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == expected
    for asked in ("tf32", "bf16"):
        if capability < (8, 0):
            with pytest.raises(InputError, match=f"{asked} needs .* Ampere"):
                choose_precision(asked, CUDA)
        else:
            assert choose_precision(asked, CUDA) == asked


def test_fp32_and_tf32_differ_by_cudnns_switch():
    try:
        for precision, dtype, switch in (
            ("tf32", None, True),
            ("fp32", None, False),
            ("bf16", torch.bfloat16, False),
        ):
            assert apply_precision(precision) == dtype
            assert torch.backends.cudnn.allow_tf32 == switch
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("0") == torch.device("cuda", 3)
    assert choose_device("cpu") == CPU


def test_free_memory_heeds_the_limit_of_a_container(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 100 kB", "MemAvailable: 50 kB"],
        "/sys/fs/cgroup/memory.max": ["max"],
        "/sys/fs/cgroup/memory.current": ["1000"],
    }
    monkeypatch.setattr(hardware, "_read_lines", lambda path: files.get(path, []))
    assert free_memory(CPU) == 50 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["11000"]
    assert free_memory(CPU) == 10000
    files.clear()
    assert free_memory(CPU) == 2**32


def test_the_clock_adds_up_its_parts():
    clock = Clock(CPU)
    for name in ("a", "b", "a"):
        with clock.part(name):
            pass
    assert list(clock.seconds) == ["a", "b"]
    assert all(seconds >= 0 for seconds in clock.seconds.values())
    assert str(clock) == "0.0 s (a 0.0, b 0.0)"
