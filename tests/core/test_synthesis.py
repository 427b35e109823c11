"""Synthesis as a whole: what is chosen, that losses fall, that the same is the same, and that a stopped run goes on to the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from graphq import ir
from graphq.calibration import open_calibration, random_calibration
from graphq.errors import ModelError, UsageError
from graphq.executor import Executor
from graphq.models import digits, onnx_path
from graphq.pipeline import PassContext
from graphq.preprocess import PRESETS
from graphq.synthesis import AUTO, STRATEGIES, choose, make_strategy, resume, synthesize
from graphq.synthesis.graph import attentions, batch_norms, class_count
from graphq.synthesis.inputs import WIDEST, image_input
from graphq.synthesis.sheet import contact_sheet
from graphq.targets import get_target

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")

VIT, CNN, LM = (onnx_path(name) for name in ("digits_vit", "digits_cnn", "digits_lm"))
OPTIMISED = [("vit-attention", VIT), ("patch-similarity", VIT), ("bn-stats", CNN), ("logits", CNN)]
ENHANCER = """<ir_version: 10, opset_import: ["" : 21]>
enhancer (float[n, 16, 16, 3] x) => (float[n, 16, 16, 3] y) <float[3, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}> { y = MatMul(x, w) }"""


def normalized(path: Path) -> ir.Model:
    """The model after the pass `normalize`, which folds BatchNormalization."""
    from graphq.recipe import pass_class

    model = ir.load(path)
    data = random_calibration(ir.inputs(model), 2)
    ctx = PassContext(model=model, reference=model, calib=data, held_out=data, target=get_target("onnxruntime"))
    pass_class("normalize")().apply(model, ctx)
    return model


def with_batch(path: Path, size: int) -> ir.Model:
    """The model as exported for one batch size."""
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    return onnx_ir.from_proto(proto)


@pytest.mark.parametrize(("name", "model"), [*OPTIMISED, ("tokens", LM), ("natural", VIT)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_takes_so_many_samples_at_once_gets_them(name: str, model: Path, size: int) -> None:
    """Counts are rounded up to whole batches, which are optimised one by one."""
    made = synthesize(with_batch(model, size), name, count=3, steps=2)
    assert {len(array) for array in made.values()} == {size * -(-3 // size)} and made.facts.batch == size


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        (lambda: ir.load(VIT), "natural", ("random images 1x32x32", "not bn-stats: there is no BatchNormalization")),
        (lambda: ir.load(CNN), "bn-stats", ("8 BatchNormalization", "not tokens: the model does not take tokens")),
        (lambda: normalized(CNN), "bn-stats", ("8 BatchNormalization",)),
        (lambda: ir.load(LM), "tokens", ("the next of 96 tokens",)),
        (lambda: ir.from_onnx_text(ENHANCER), "natural", ("random images 3x16x16", "not tokens")),
    ],
    ids=["vit", "cnn", "folded cnn", "lm", "enhancer"],
)  # fmt: skip
def test_auto_says_what_it_takes_and_why(model: object, name: str, words: tuple[str, ...]) -> None:
    chosen, why = choose(model())  # type: ignore[operator]
    assert chosen.name == name and all(word in why for word in words), why


def test_a_file_does_not_keep_what_was_folded(tmp_path: Path) -> None:
    ir.save(normalized(CNN), tmp_path / "folded.onnx")
    chosen, why = choose(ir.load(tmp_path / "folded.onnx"))
    assert chosen.name == "natural" and "not bn-stats" in why


def test_folded_statistics_are_those_of_the_output_that_is_left() -> None:
    """Over the training images, the outputs of folded convolutions have the means and deviations that the snapshot says, roughly."""
    for model in (ir.load(CNN), normalized(CNN)):
        first, *_, last = batch_norms(model)
        executor = Executor(model, [_fetch(first.value), _fetch(last.value)])
        values = executor.run({"input": digits.calibration(64)})
        for value, goal in zip(values, (first, last), strict=True):
            away = (value.mean(axis=(0, 2, 3)) - goal.mean) / goal.deviation
            assert np.abs(away).max() < 0.5 and np.abs(value.std(axis=(0, 2, 3)) / goal.deviation - 1).max() < 0.5


def _fetch(name: str) -> object:
    from graphq.executor import Fetch

    return Fetch(name)


def test_strategies_by_name_say_what_they_found() -> None:
    assert choose(ir.load(VIT), "vit-attention")[1] == "4 layers of attention over 8x8 patches, 10 classes"
    assert choose(ir.load(CNN), "logits")[1] == "images 1x32x32, 10 classes"


def test_attention_is_found_with_its_grid() -> None:
    layers = attentions(ir.load(VIT), 32, 32)
    assert len(layers) == 4 and {(layer.heads, layer.grid) for layer in layers} == {(3, (8, 8))}
    with pytest.raises(ModelError, match="attention"):
        attentions(ir.load(VIT), 32, 48)  # its tokens are no patches of such an image
    assert class_count(ir.load(VIT)) == 10


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit-atention", {}, ("vit-attention", "did you mean")),
        ("vit-attention", {"region": True}, ("region", "regions")),
        ("vit-attention", {"rate": "fast"}, ("rate", "number")),
        ("auto", {"rate": 0.1}, ("auto",)),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        choose(ir.load(VIT), name, options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("name", "model"), [("bn-stats", VIT), ("vit-attention", CNN), ("tokens", CNN), ("logits", LM)])
def test_a_strategy_refuses_what_it_finds_nothing_in(name: str, model: Path) -> None:
    with pytest.raises(ModelError):
        synthesize(model, name, count=2, steps=1)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("graphq.synthesis.", "graphq.torch_executor"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"graphq\[torch\]"):
        choose(ir.load(CNN), "bn-stats")


def test_every_strategy_is_there_and_documented() -> None:
    assert set(AUTO) <= set(STRATEGIES)
    for name in STRATEGIES:
        one = make_strategy(name, {})
        assert one.name == name and one == make_strategy(name, {})
        about = type(one).__doc__ or ""
        assert not about.startswith(f"{type(one).__name__}(") and all(option in about for option in type(one).__dataclass_fields__)  # type: ignore[attr-defined]


# ---- what is made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model"), OPTIMISED, ids=[name for name, _ in OPTIMISED])
def test_losses_fall(name: str, model: Path) -> None:
    facts = synthesize(model, name, count=4, steps=20, preprocess="inception").facts
    assert (facts.strategy, facts.count, facts.steps, facts.seed) == (name, 4, 20, 0) and facts.seconds > 0
    assert sum(facts.last.values()) < 0.8 * sum(facts.first.values())
    falling = {"vit-attention": "attention", "patch-similarity": "similarity", "bn-stats": "statistics", "logits": "labels"}[name]
    assert facts.last[falling] < facts.first[falling] - 0.2 * abs(facts.first[falling])


@pytest.mark.parametrize("options", [{"priors": False}, {"regions": False}, {"soft_labels": False}, {}], ids=str)
def test_parts_of_vit_attention_can_be_left_out(options: dict[str, bool]) -> None:
    made = synthesize(VIT, "vit-attention", options=options, count=2, steps=3)
    assert made.facts.options == options and ("attention" in made.facts.last) == options.get("priors", True)
    if options:
        assert not np.array_equal(made["input"], synthesize(VIT, "vit-attention", count=2, steps=3)["input"])


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "clip"])  # which needs texts: tests of its own
def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    model = {"tokens": LM, "bn-stats": CNN, "logits": CNN, "natural": CNN}.get(name, VIT)
    first, again, other = (synthesize(model, name, count=3, steps=4, seed=seed) for seed in (1, 1, 2))
    assert {key: array.tobytes() for key, array in first.items()} == {key: array.tobytes() for key, array in again.items()}
    assert any(array.tobytes() != other[key].tobytes() for key, array in first.items())


@pytest.mark.parametrize(("name", "model"), [("vit-attention", VIT), ("patch-similarity", VIT), ("logits", CNN), ("natural", CNN)])
def test_a_sample_does_not_depend_on_its_batch(name: str, model: Path) -> None:
    """Sums of other lengths round otherwise, and Adam's first steps only look at signs: what differs must be few pixels, by little."""
    whole, parts = (synthesize(model, name, count=4, steps=3, batch=size)["input"] for size in (4, 2))
    assert not np.array_equal(whole[:2], whole[2:])
    assert np.mean(np.abs(whole - parts) > 1e-3) < 0.01


def test_values_stay_within_what_pixels_can_have() -> None:
    for preset, (low, high) in (("inception", (-1, 1)), ("unit", (0, 1)), (None, (-WIDEST, WIDEST))):
        for name in ("logits", "natural"):
            made = synthesize(CNN, name, count=2, steps=2, preprocess=preset)["input"]
            assert low <= made.min() < low + 0.2 * (high - low) and high - 0.2 * (high - low) < made.max() <= high


def test_preprocessing_in_the_order_of_the_models_axes() -> None:
    made = synthesize(ir.from_onnx_text(ENHANCER), "natural", count=3, preprocess="imagenet")
    bounds = PRESETS["imagenet"].apply(np.array([[[[0, 0, 0]]], [[[255, 255, 255]]]], np.uint8))[:, :, 0, 0]
    assert made["x"].shape == (3, 16, 16, 3) and (made["x"] >= bounds[0]).all() and (made["x"] <= bounds[1]).all()


@pytest.mark.parametrize("leaves", [True, False])
def test_natural_images_have_the_spectrum_of_photographs(leaves: bool) -> None:
    made = synthesize(CNN, "natural", options={"leaves": leaves}, count=48)["input"][:, 0]
    power = (np.abs(np.fft.fft2(made - made.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    rows, columns = (np.log(along[1:9]) for along in (power[:, 0], power[0]))
    slopes = [np.polyfit(np.log(np.arange(1, 9)), along, 1)[0] for along in (rows, columns)]
    assert all(-2.6 < slope < -1.3 for slope in slopes), slopes  # amplitude 1 / frequency: power -2; photographs have -1.6 to -2.4
    edges = np.abs(np.diff(made, axis=2))
    assert (np.mean(edges**4) / np.mean(edges**2) ** 2 > 4) == leaves  # steps and flat parts: heavy tails; a Gaussian has 3


W4A4 = """passes:
  - normalize
  - ln-reparam: {bits: 4}
  - sulq-softmax: {bits: 4}
  - dynamic-activations: {bits: 4, symmetric: false}
  - insert-qdq: {activation_bits: 4, weights: false, attention: true, ranges: mse, tables: false, error_samples: 0}
  - round: {bits: 4, algorithm: rtn, correct_bias: false}"""


@pytest.mark.parametrize("seed", range(3))
def test_synthesized_images_lie_between_noise_and_real_ones(seed: int) -> None:
    """SQNR of the logits of 128 test images, 4 bits throughout: synthesized images beat noise, and do not beat real ones by 2 dB."""
    images = digits.calibration(256)[np.random.default_rng(seed).permutation(256)[:16]]
    noise = np.random.default_rng(seed).standard_normal(images.shape, np.float32)
    made = synthesize(VIT, "vit-attention", count=16, steps=30, seed=seed, preprocess="inception")["input"]
    errors = {name: w4a4_sqnr(calib) for name, calib in (("noise", noise), ("made", made), ("real", images))}
    assert errors["noise"] + 0.5 < errors["made"] < errors["real"] + 2 and errors["noise"] + 0.5 < errors["real"], errors


def w4a4_sqnr(images: np.ndarray) -> float:
    """What is left of the logits of test images after the recipe `W4A4`, calibrated on `images`, in dB."""
    from graphq.noise import decibel
    from graphq.pipeline import run_passes
    from graphq.recipe import parse_recipe

    original, test = ir.load(VIT), digits.images("test")[0][:128]
    data = open_calibration({"input": images}, ir.inputs(original))
    ctx = PassContext(model=ir.clone(original), reference=original, calib=data, held_out=data, target=get_target("onnxruntime"))
    run_passes(parse_recipe(W4A4, "W4A4").passes, ctx, lambda model: None)
    before, after = (Executor(model).run({"input": test})[0].astype(np.float64) for model in (original, ctx.model))
    return decibel(float((before**2).sum()), float(((after - before) ** 2).sum()))


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_a_language_model_writes_what_it_finds_likely() -> None:
    made = synthesize(LM, count=8, steps=24)
    assert made["input_ids"].shape == (8, 24) and made["past_key_values.0.key"].shape == (8, 4, 0, 32)
    assert made.facts.last["nats a token"] < 0.6 * np.log(96)
    cold = synthesize(LM, options={"temperature": 0.5}, strategy="tokens", count=8, steps=24)
    assert cold.facts.last["nats a token"] < made.facts.last["nats a token"]


MASKED = """<ir_version: 10, opset_import: ["" : 21]>
masked (int64[n, t] ids, int64[n, t] attention_mask) => (float[n, t, 8] logits)
<float[8, 8] table = {VALUES}, int64[1] all = {1}> {
  each = Gather(table, ids)
  mean = ReduceMean(each, all)
  logits = Add(each, mean)
}"""


def test_an_encoder_gets_random_tokens_and_a_mask() -> None:
    model = ir.from_onnx_text(MASKED.replace("VALUES", ", ".join(str(k % 5) for k in range(64))))
    chosen, why = choose(model)
    assert chosen.name == "tokens" and "RANDOM" in why
    made = synthesize(model, count=16, steps=10)
    lengths = made["attention_mask"].sum(axis=1)
    assert made["ids"].dtype == np.int64 and made["ids"].min() >= 0 and made["ids"].max() < 8
    assert lengths.min() >= 5 and lengths.max() <= 10 and len(set(lengths)) > 2
    assert (made["ids"][made["attention_mask"] == 0] == 0).all()


# ---- stopping and going on ------------------------------------------------------------------------------------------


class _Stop:
    """Raises KeyboardInterrupt at a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, list[int]()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seen.append(done)
        if done >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "model"), [("vit-attention", VIT), ("bn-stats", CNN), ("tokens", LM)])
def test_a_stopped_run_goes_on_to_the_same_bytes(name: str, model: Path, tmp_path: Path) -> None:
    asked = {"count": 4, "batch": 2, "steps": 6, "seed": 5}
    whole = synthesize(model, name, **asked)  # type: ignore[arg-type]
    for at in (4, 9):  # within the first batch, and within the second
        with pytest.raises(KeyboardInterrupt):
            synthesize(model, name, **asked, resume=tmp_path / "part", progress=_Stop(at))  # type: ignore[arg-type]
    watch = _Stop(1000)
    made = synthesize(model, name, **asked, resume=tmp_path / "part", progress=watch)  # type: ignore[arg-type]
    assert min(done for done in watch.seen[1:]) > 9  # nothing was done twice
    assert {key: array.tobytes() for key, array in made.items()} == {key: array.tobytes() for key, array in whole.items()}
    assert made.facts.last == whole.facts.last and made.facts.first == whole.facts.first
    resume.clear(tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    synthesize(CNN, "natural", count=2, resume=folder)
    for other in ({"count": 3}, {"count": 2, "seed": 1}, {"count": 2, "preprocess": "unit"}):
        with pytest.raises(UsageError, match="another one"):
            synthesize(CNN, "natural", **other, resume=folder)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another one"):
        synthesize(VIT, "natural", count=2, resume=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    with pytest.raises(UsageError, match="other files"):
        synthesize(CNN, "natural", count=2, resume=tmp_path / "mine")
    resume.clear(tmp_path / "mine")
    assert (tmp_path / "mine" / "photo.png").exists()


# ---- the sheet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [([("n"), 1, 4, 6], 1), (["n", 4, 6, 3], 3)])
def test_the_contact_sheet_is_a_png_of_the_pixels(shape: list[object], channels: int, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed (pip install graphq[images])")
    from graphq.spec import ModelInput

    image = image_input([ModelInput("x", np.dtype(np.float32), tuple(shape))], PRESETS["inception"])  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 256, (11, 4, 6, channels)).astype(np.uint8)
    values = (pixels / 127.5 - 1).astype(np.float32)
    (tmp_path / "sheet.png").write_bytes(contact_sheet(values if channels == 3 else values.transpose(0, 3, 1, 2), image))
    with image_module.open(tmp_path / "sheet.png") as sheet:
        found = np.asarray(sheet).reshape(sheet.height, sheet.width, channels)
    factor = 112 // 6
    height, width = 4 * factor, 6 * factor
    assert found.shape == (2 * height + 2, 8 * width + 14, channels)
    for index in (0, 7, 10):
        top, left = index // 8 * (height + 2), index % 8 * (width + 2)
        tile = found[top : top + height : factor, left : left + width : factor]
        assert np.abs(tile.astype(int) - pixels[index]).max() <= 1
