import errno
import json
import os

import pytest

from magicpig.studies.evaluation.results import ResultsError, ResultsFile, read_results

SETTINGS = {"settings": {"seed": 0, "samplers": {"lsh": {"K": 10}}}, "model": {"sha256": "ab"}}
MADE = {"date": "today", "isa": "avx2", "commit": "c0ffee", "versions": {"torch": "2.13", "system": "Linux"}}
GROUP = 2


def opened(path, settings=SETTINGS, made=MADE):
    return ResultsFile(path, settings, made, group=GROUP)


def group(i):
    return [{"index": i, "sampler": name, "prediction": f"{'ü' * i}\n{i}"} for name in ("full", "lsh")]


def write(path, groups=3, **options):
    with opened(path, **options) as file:
        for i in range(file.done, groups):
            file.append(group(i))
    return path.read_bytes()


def test_header_then_one_group_per_sample(tmp_path):
    write(tmp_path / "r.jsonl")
    results = read_results(tmp_path / "r.jsonl")
    assert results.header == {"format": "magicpig results 1", **SETTINGS, "made": MADE}
    assert results.lines == [line for i in range(3) for line in group(i)]
    assert results.resumed == []


def test_cut_off_anywhere_and_continued_it_is_the_same(tmp_path):
    whole = write(tmp_path / "whole.jsonl")
    path = tmp_path / "torn.jsonl"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert write(path) == whole


def test_only_what_is_missing_is_asked_for(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, 2)
    with opened(path) as file:
        assert file.done == 2
    data = path.read_bytes()
    path.write_bytes(data[:-1])  # the last line break is missing
    with opened(path) as file:
        assert file.done == 1


@pytest.mark.parametrize(
    ("settings", "made", "named"),
    [
        ({**SETTINGS, "settings": {"seed": 1, "samplers": {"lsh": {"K": 10}}}}, MADE, "settings.seed = 0, now it is 1"),
        ({**SETTINGS, "settings": {"seed": 0, "samplers": {"lsh": {"K": 9}}}}, MADE, "settings.samplers.lsh.K = 10"),
        ({**SETTINGS, "settings": {"seed": 0, "samplers": {}}}, MADE, "settings.samplers.lsh = {"),
        ({**SETTINGS, "model": {"sha256": "cd"}}, MADE, 'model.sha256 = "ab"'),
        (SETTINGS, {**MADE, "isa": "avx512"}, 'isa = "avx2", now it is "avx512"'),
        (SETTINGS, {**MADE, "versions": {"torch": "2.14", "system": "Linux"}}, 'versions.torch = "2.13"'),
    ],
)
def test_other_settings_are_refused_by_name(settings, made, named, tmp_path):
    path = tmp_path / "r.jsonl"
    before = write(path, 2)
    with pytest.raises(ResultsError) as refused:
        write(path, settings=settings, made=made)
    assert named in str(refused.value)
    assert path.read_bytes() == before


def test_another_commit_is_noted_where_it_begins(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, 1)
    later = {**MADE, "date": "tomorrow", "commit": "decaf"}
    write(path, 2, made=later)
    write(path, 3, made={**later, "date": "next week"})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[1:] == [*group(0), {"resumed": later}, *group(1), *group(2)]
    assert read_results(path).resumed == [later]
    assert read_results(path).lines == [line for i in range(3) for line in group(i)]


def test_two_runs_do_not_write_one_file(tmp_path):
    with opened(tmp_path / "r.jsonl"), pytest.raises(ResultsError, match="another run is writing it"):
        write(tmp_path / "r.jsonl")
    write(tmp_path / "r.jsonl")


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b'{"some": "json"}\n', b"\n"])
def test_files_of_others_are_left_alone(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match="is not a results file"):
        write(path)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_no_torn_end(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{]\n", *lines[3:]]))
    for action in (read_results, write):
        with pytest.raises(ResultsError, match="line 3 is damaged"):
            action(path)


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(ResultsError, match="No such file or directory"):
        write(tmp_path / "missing" / "r.jsonl")
    with pytest.raises(ResultsError, match="Is a directory"):
        write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ResultsError, match="not a regular file"):
        write(tmp_path / "pipe")
    with pytest.raises(ResultsError, match="No such file"):
        read_results(tmp_path / "missing")


def test_a_full_disk_keeps_what_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    before = write(path, 2)
    pwrite = os.pwrite

    def half(file, data, offset):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(ResultsError, match=r"No space left on device; 2 samples are safe in it"):
        write(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert write(path) == write(tmp_path / "other.jsonl")
