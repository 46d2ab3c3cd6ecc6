"""The model card says what the model is and what it scored."""

import json

from magicpig.studies.evaluation.results import Results
from magicpig.studies.pocket import card, path


def test_the_card_has_the_shape_and_a_row_for_every_task():
    def line(task, length, score):
        same = {"index": 0, "protocol": "question-dense", "sampler": "full", "share_mean": None, "share_max": None}
        return {"task": task, "length": length, "score": score, "index_bytes": 0, "kv_bytes": 1, **same}

    header = {"settings": {"seed": 3, "samplers": {"full": {"sampler": "full"}}}}
    results = Results(header, [], [line("vt", 1024, 1.0), line("cwe", 1024, 0.25), line("vt", 4096, 0.0)])
    text = card.write(path(), results, command="the command", machine="A machine.")
    config = json.loads((path() / "config.json").read_text())
    assert f"hidden size {config['hidden_size']}" in text
    assert "    the command\n\nA machine." in text
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert rows[0] == "| task | 1,024 | 4,096 |"
    assert any(row.startswith("| vt | 100 (") and "| 0 (0-" in row for row in rows)
    assert any(row.startswith("| cwe | 25 (") and row.endswith("|  |") for row in rows)
    assert "(1 samples a cell, seed 3)" in text
