"""The README's snippets run as they are written, one after the other, in one session."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from magicpig import MagicPigCache
from magicpig.studies import pocket

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With the model that ships for "path/to/model". Its text is long enough to be sampled."""
    (tmp_path / "long.txt").write_text("the green book is in the old house . " * 250, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(snippets) >= 3
    session: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ResourceWarning)  # open() in one line
        for snippet in snippets:
            exec(compile(snippet.replace("path/to/model", str(pocket.path())), "README.md", "exec"), session)
    assert isinstance(session["cache"], MagicPigCache)
    assert session["report"].sampled_share_mean is not None
    assert session["model"].config._attn_implementation != "magicpig"
    assert session["inputs"]["input_ids"].shape[1] > 2048
    assert session["output"].shape == (1, 32, 1, 128)
    assert len(capsys.readouterr().out.splitlines()) >= 3
