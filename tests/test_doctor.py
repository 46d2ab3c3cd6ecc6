import dataclasses

import pytest
import torch

from magicpig import doctor
from magicpig.kernels import library


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_a_sound_machine_is_healthy(report):
    assert report.healthy
    assert report.isa == library.isa()
    assert report.isa in report.isa_usable
    assert set(report.isa_usable) <= set(report.isa_built)


def test_every_usable_level_is_checked_and_the_used_one_stays(report):
    assert {check.isa for check in report.checks} == set(report.isa_usable)
    assert {check.dtype for check in report.checks} == {"float32", "bfloat16"}
    assert library.isa() == report.isa


def test_wrong_kernels_are_found_out(monkeypatch):
    right = doctor.attend

    def slightly_wrong(*arguments, **settings):
        output, lse, info = right(*arguments, **settings)
        return output + 1e-3 if settings.get("sampler") != "full" else output, lse, info

    monkeypatch.setattr(doctor, "attend", slightly_wrong)
    failed = {(check.dtype, check.what) for check in doctor.self_check(["portable"]) if not check.passed}
    assert ("float32", "samples every key") in failed
    assert ("float32", "reads every key") not in failed


def test_the_used_level_stays_when_a_check_raises(monkeypatch):
    monkeypatch.setattr(doctor, "attend", lambda *_, **__: 1 / 0)
    used = library.isa()
    with pytest.raises(ZeroDivisionError):
        doctor.self_check(["portable"])
    assert library.isa() == used


def test_nan_is_a_failure(report):
    assert not dataclasses.replace(report.checks[0], error=float("nan")).passed


@pytest.fixture
def ideal(report):
    """A machine about which there is nothing to say."""
    return dataclasses.replace(
        report,
        isa="avx512bf16",
        isa_usable=["avx512bf16", "portable"],
        isa_built=["avx512bf16", "portable"],
        usable_cpus=4,
        cpu_quota=None,
        physical_cores=4,
        torch_threads=4,
        pool="torch",
        memory_limit=None,
        huge_pages="madvise",
        numa_nodes=2,
    )


def test_nothing_to_improve(ideal):
    assert doctor.advise(ideal) == []


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"isa": "portable"}, "unset MAGICPIG_ISA: it forces portable, this machine can run avx512bf16"),
        ({"isa": "avx2", "isa_usable": ["avx2"]}, "a processor with avx512bf16 would be faster"),
        ({"torch_threads": 1}, "set OMP_NUM_THREADS=4: torch uses 1 of 4 cores"),
        ({"torch_threads": 8}, "set OMP_NUM_THREADS=4: 8 threads share 4 processors"),
        ({"physical_cores": None, "torch_threads": 2}, "set OMP_NUM_THREADS=4"),
        (
            {"cpu_quota": 1.5},
            "set OMP_NUM_THREADS=2: 4 threads share 2 processors, which is all that the container may",
        ),
        ({"cpu_quota": 0.5, "torch_threads": 2}, "set OMP_NUM_THREADS=1: 2 threads share 1 processor, which"),
        ({"cpu_quota": 8.0, "torch_threads": 3}, "set OMP_NUM_THREADS=4: torch uses 3 of 4 cores"),
        ({"pool": "serial"}, "unset MAGICPIG_POOL: the serial pool"),
        ({"huge_pages": "never"}, "set /sys/kernel/mm/transparent_hugepage/enabled to madvise"),
        ({"memory_limit": 2**30}, "raise the container's limit of 1.0 GiB"),
    ],
)
def test_advice(ideal, facts, advice):
    (line,) = doctor.advise(dataclasses.replace(ideal, **facts))
    assert advice in line


def test_gpu_is_named_when_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(doctor, "self_check", list)
    assert doctor.examine().gpu == "Some GPU"
