"""Small, real, trained networks, one per family that graphq's methods address.

Each model `NAME` is a definition `NAME.py` (torch), a trained `NAME.onnx` beside it, and a row in `train.py`; the
language model and the dual encoder have programs of their own, `train_lm.py` and `train_clip.py`. Importing this
package, or the data of a model, needs numpy only; torch is needed to retrain and for nothing else.
"""

from pathlib import Path

__all__ = ["onnx_path"]


def onnx_path(name: str) -> Path:
    """Path of the trained ONNX file of a model, such as `onnx_path("digits_vit")`."""
    folder = Path(__file__).parent
    path = folder / f"{name}.onnx"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.onnx")))
        raise FileNotFoundError(f"no trained model named {name!r}; the models are: {known}")
    return path
