from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.model_dir import ModelError
from magicpig.studies import pocket


def test_without_a_model_the_pocket_model_is_drawn(tmp_path, monkeypatch):
    def missing():
        raise ModelError("there is no pocket model")

    monkeypatch.setattr(pocket, "path", missing)
    result = CliRunner().invoke(app, ["figures", "--out", str(tmp_path / "out")], prog_name="magicpig")
    assert result.exit_code == 2
    assert result.stderr == "magicpig: error: there is no pocket model, or pass --model\n"
    assert list(tmp_path.iterdir()) == []
