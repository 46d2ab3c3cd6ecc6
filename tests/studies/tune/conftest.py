"""No test looks at times, so caches need not be cold."""

import pytest

from magicpig.studies.bench import layer


@pytest.fixture(autouse=True)
def warm_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 12)
