import os
import platform
import subprocess

import psutil
import pytest

from magicpig import machine


def test_processor_is_described():
    assert machine.cpu_model()
    assert 1 <= machine.usable_cpus() <= (os.cpu_count() or 1)
    assert 0 < machine.available_memory() <= machine.total_memory()
    assert machine.numa_nodes() >= 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), (None, None)],
)
def test_huge_pages(setting, expected, tmp_path):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    assert machine.huge_pages(path) == expected


def test_numa_nodes_are_counted(tmp_path):
    for name in ("node0", "node1", "possible"):
        (tmp_path / name).mkdir()
    assert machine.numa_nodes(tmp_path) == 2


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "max\n"}, 5000),
        ("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "7000\n"}, 5000),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "3000\n"}, 3000),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "3000\n"}, None),
    ],
    ids=["none", "max", "of the parent", "the tightest", "version 1", "version 1 unlimited", "other controller"],
)
def test_memory_limit_of_the_container(membership, limits, expected, tmp_path):
    (tmp_path / "cgroup").write_text(membership)
    for name, text in limits.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.cgroup_limit(tmp_path / "fs", tmp_path / "cgroup") == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "20000 10000\n"}, 1.5),
        ("0::/a\n", {"a/cpu.max": "\n"}, None),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
    ],
    ids=[
        "none",
        "max",
        "of the parent",
        "the tightest",
        "empty",
        "version 1",
        "version 1 unlimited",
        "other controller",
    ],
)
def test_processor_quota_of_the_container(membership, files, expected, tmp_path):
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.cpu_quota(tmp_path / "fs", tmp_path / "cgroup") == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.3, 1), (2.0, 2), (2.1, 3), (64.0, 8)])
def test_threads_follow_the_quota(quota, expected, monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.default_threads() == expected


def test_no_memory_limit_without_control_groups(tmp_path):
    assert machine.cgroup_limit(tmp_path, tmp_path / "missing") is None


def test_free_memory_is_what_the_machine_or_the_container_has_left(monkeypatch):
    held = psutil.Process().memory_info().rss
    monkeypatch.setattr(machine, "available_memory", lambda: 10 << 40)
    for limit, free in ((None, 10 << 40), (20 << 40, 10 << 40), (held + (1 << 40), 1 << 40), (1000, 0)):
        monkeypatch.setattr(machine, "cgroup_limit", lambda limit=limit: limit)
        assert machine.free_memory() == pytest.approx(free, abs=1 << 30)  # the process may grow meanwhile


def test_versions():
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert found["magicpig"] != "not installed"


def test_missing_packages_are_named(monkeypatch):
    def missing(name):
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.versions()["torch"] == "not installed"


def test_environment_lists_only_what_is_set(monkeypatch):
    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.environment() == {"OMP_NUM_THREADS": "3"}


def test_commit_says_when_the_tree_is_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "src" / "magicpig" / "machine.py"))
    assert machine.commit() is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = machine.commit()
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert machine.commit() == clean + "+changes"


def test_no_commit_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "src" / "magicpig" / "machine.py"))
    assert machine.commit() is None
