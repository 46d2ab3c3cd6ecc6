"""The pocket model: a small Llama that solves the tasks of `magicpig.studies.evaluation`, shipped with the package.

It exists so that demonstrations, tests, figures and the evaluation run on the attention of a trained model without any
download. `magicpig pocket train` makes it; its model card stands beside the weights.
"""

from __future__ import annotations

from pathlib import Path

from magicpig.model_dir import ModelError

__all__ = ["path"]


def path() -> Path:
    """The folder of the shipped model, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`.

    Raises ModelError when the package was built without it.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"the pocket model is not in {folder}; make it with 'magicpig pocket train --out DIR'")
    return folder
