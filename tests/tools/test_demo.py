# SPDX-License-Identifier: Apache-2.0
import io
import re
import socket
import sys
import warnings
from collections import OrderedDict
from html import escape

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evit_jax.data.names import imagenet_names
from evit_jax.errors import InputError
from evit_jax.measure import side_by_side
from evit_jax.measure.side_by_side import SideBySide
from evit_jax.models import create_model, named
from evit_jax.models.images import preprocess
from evit_jax.pictures import side_by_side as html
from evit_jax.plan.flops import macs
from evit_jax.tools import demo
from evit_jax.training.trained import load_run, spec_of_name, spec_of_run
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.support.trained_run import make_run
from tests.tools.test_visualize import named_tiny

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=4, num_classes=10)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(side_by_side, "ROUNDS", 2)
    monkeypatch.setattr(side_by_side, "SECONDS", 0.001)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file of a model that is named "tiny" meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        named_tiny(patch, TINY)
        yield write_weights("tiny", tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def tiny_once(weights):
    return SideBySide(spec_of_name("tiny", weights))


@pytest.fixture
def tiny(tiny_once, monkeypatch):
    """With nothing compiled."""
    monkeypatch.setattr(tiny_once, "programs", OrderedDict())
    return tiny_once


def write_weights(name, path):
    """Random ones, with a head that is sure of some classes."""
    model, params = create_model(name)
    if model.num_classes:
        kernel = np.random.default_rng(0).normal(0, 1, (model.width, model.num_classes))
        params["head"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    write_safetensors(path, tensors_from_params(params, model))
    return str(path)


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(folder):
    path = folder / "photograph.png"
    path.write_bytes(encoded(Image.fromarray(pixels(50, 70, 3))))
    return str(path)


def test_what_is_seen_is_what_the_models_say(tiny, weights, tmp_path):
    path = photograph(tmp_path)
    model = tiny.plan("evit", keep_rate=0.5)
    look = tiny.look(tiny.view((tmp_path / "photograph.png").read_bytes()), model)
    images = preprocess("tiny", path, size=(32, 32))
    outputs = {}
    for name, rate in (("dense", 1), ("reduced", 0.5)):
        one, params = create_model("tiny", weights=weights, keep_rate=rate)
        logits, out = jax.jit(one.apply)({"params": params}, images)
        outputs[name] = np.asarray(jax.nn.softmax(logits[0]))
        seen = getattr(look, name)
        best = np.argsort(-outputs[name])[:5]
        assert [label for label, _ in seen.top] == [f"class {i}" for i in best]
        np.testing.assert_allclose([p for _, p in seen.top], outputs[name][best], atol=1e-6)
        assert seen.tokens == one.tokens_per_block
        assert seen.macs == macs(one)
        assert 0 < seen.milliseconds < 10_000
    p, q = outputs["dense"], outputs["reduced"]
    assert look.kl == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-3)
    assert look.kl > 1e-4
    assert look.cosine is None
    assert look.blocks == (1, 2, 3)
    for ours, theirs in zip(look.owners, out["owner"], strict=True):
        np.testing.assert_array_equal(ours, theirs[0])


def test_all_methods_that_need_no_training_meet_a_share(tiny):
    assert tiny.methods[0] == "ward"
    assert {"evit", "tome", "dpcknn", "random", "diffrate"} < set(tiny.methods)
    learned = {"dynamicvit", "patchmerger", "sit", "cropr", "diffrate_search"}
    assert not {*learned, "shift", "hiprune"} & set(tiny.methods)
    for method in tiny.methods:
        model = tiny.plan(method, share=0.7)
        assert 0.4 < macs(model) / macs(tiny.dense) <= 0.7
        assert not isinstance(model.reducer, nn.Module)


def test_without_a_class_token_and_without_classes_features_are_compared(monkeypatch, tmp_path):
    named_tiny(monkeypatch, TINY | dict(class_token=False, pool="avg", num_classes=0))
    card = dict(statistics="half", crop=0.9, image_size=32, num_classes=0)
    named.table()["tiny"]["tags"][""] = card
    both = SideBySide(spec_of_name("tiny", write_weights("tiny", tmp_path / "w.safetensors")))
    assert both.methods[0] == "ward:by=mean"
    assert {"evit:by=mean", "tome"} < set(both.methods)
    look = both.look(both.view(pixels(32, 32, 3)), both.plan("tome", share=0.6))
    assert look.kl is None
    assert look.dense.top == ()
    assert 0 < look.cosine < 1
    text = html.result(look)
    assert f"<b>{look.cosine:.4f}</b>" in text
    assert '<div class="class">' not in text


def test_a_plan_is_compiled_once_and_those_used_last_are_kept(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(side_by_side, "MOST_PLANS", 2)
    monkeypatch.setattr(SideBySide, "compile_one", lambda self, model: compiled.append(model))
    a, b, c = (tiny.plan("evit", keep_rate=rate) for rate in (0.5, 0.6, 0.7))
    assert not tiny.compiled(a)
    for model in (a, b, a, tiny.plan("evit", keep_rate=0.5), c, a):
        tiny.compile(model)
        assert tiny.compiled(model)
    assert compiled == [a, tiny.dense, b, c]
    assert not tiny.compiled(b)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(pixels(40, 60)),
        Image.fromarray(pixels(40, 60, 4)),
        Image.fromarray(pixels(1, 1, 3)),
        Image.fromarray(pixels(3, 500, 3)),
        Image.fromarray(pixels(40, 60, 3)).convert("P"),
        Image.fromarray(pixels(40, 60).astype(np.uint16) * 257),
    ],
    ids=["grey", "with alpha", "a pixel", "long", "palette", "16 bit"],
)
def test_pictures_of_any_size_and_mode_are_seen(picture, tiny):
    view = tiny.view(encoded(picture))
    assert (view.size, view.mode) == ((32, 32), "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_a_camera_held_sideways_took_is_turned(mode, tiny):
    picture = Image.new(mode, (64, 64))
    picture.paste(255 if mode == "L" else (255,) * 3, (0, 0, 64, 32))  # white above
    exif = Image.Exif()
    exif[274] = 6  # to be turned to the right: white is then on the right
    view = np.asarray(tiny.view(encoded(picture, "JPEG", exif=exif)))
    assert view[:, :12].max() < 30
    assert view[:, -12:].min() > 225


def test_damaged_exif_data_are_no_reason_to_refuse_a_picture(tiny):
    good = encoded(Image.new("RGB", (64, 64)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():  # Pillow's, of which the tester need not hear
        warnings.simplefilter("ignore")
        assert tiny.view(good).size == (32, 32)


def last(steps):
    *_, (status, shown) = steps
    return status, shown


def test_the_page_is_told_step_by_step(tiny, tmp_path):
    path, models = photograph(tmp_path), dict(tiny=tiny)
    steps = list(demo.answers(models, "tiny", "evit", "keep_rate", 0.5, path))
    assert "Compiling evit" in steps[0][0]
    assert steps[0][1] == ""
    assert "tiny, evit" in steps[-1][0]
    shown = steps[-1][1]
    assert shown.count("data:image/png;base64,") == 4  # the picture, and after blocks 1, 2, 3
    assert re.findall(r">block (\d): (\d+) tokens<", shown) == [("1", "9"), ("2", "6"), ("3", "4")]
    assert "of 17 tokens after block 1" in shown
    assert "KL from dense to reduced" in shown
    again = list(demo.answers(models, "tiny", "evit", "keep_rate", 0.5, path))
    assert len(again) == 1


def test_what_cannot_be_is_said_on_the_page(tiny, tmp_path):
    models, path = dict(tiny=tiny), photograph(tmp_path)
    assert "Drop a picture" in last(demo.answers(models, "tiny", "evit", "share", 0.5, None))[0]
    broken = tmp_path / "<b>.png"
    broken.write_text("no picture")
    status, shown = last(demo.answers(models, "tiny", "evit", "share", 0.5, str(broken)))
    assert "the picture cannot be read as an image: cannot identify image file" in status
    assert shown == ""
    for arguments, text in [
        (("evit", "share", 0.01), "no plan with these layers costs at most"),
        (("evit", "keep_rate", 0.999), "reduces nothing"),
        (("dynamicvit", "share", 0.5), "unknown method"),
    ]:
        assert text in last(demo.answers(models, "tiny", *arguments, path))[0]
    gone = last(demo.answers(models, "tiny", "evit", "share", 0.5, str(tmp_path / "gone.png")))
    assert "No such file" in gone[0]


def test_names_are_escaped_and_shown_in_order(weights):
    names = [f"<i>{i}</i> & more" for i in range(10)]
    tiny = SideBySide(spec_of_name("tiny", weights), names)
    look = tiny.look(tiny.view(pixels(32, 32, 3)), tiny.plan("tome", share=0.6))
    text = html.result(look)
    assert "&lt;i&gt;" in text
    assert "<i>0" not in text
    places = [text.index(escape(name)) for name, _ in look.dense.top]
    assert places == sorted(places)
    with pytest.raises(InputError, match="there are 9 names and tiny has 10 classes"):
        SideBySide(spec_of_name("tiny", weights), names[:9])


def test_the_names_of_imagenet_are_those_of_its_classes():
    names = imagenet_names()
    assert len(set(names)) == 1000
    known = {0: "tench", 134: "crane (bird)", 207: "golden retriever", 285: "Egyptian cat",
             517: "crane (machine)", 967: "espresso", 999: "toilet tissue"}  # fmt: skip
    assert {i: names[i] for i in known} == known
    assert demo.class_names(spec_of_name("deit_tiny_patch16_224", "x"), 1000) == list(names)
    assert demo.class_names(spec_of_name("vit:width=48", "x"), 1000) is None
    assert demo.class_names(spec_of_name("deit_tiny_patch16_224", "x"), 10) is None


def test_a_run_brings_its_names_its_method_and_small_images(tmp_path):
    params = make_run(tmp_path / "run")
    options = demo.parse([f"--workdir={tmp_path / 'run'}"])
    models = demo.open_models(options)
    ((label, model),) = models.items()
    assert label == str(tmp_path / "run")
    assert model.methods[0] == "evit"
    assert list(model.classes) == list("0123456789")
    np.testing.assert_array_equal(model.params["head"]["kernel"], params["head"]["kernel"])
    pictures = demo.examples(options, models, tmp_path)
    assert [Image.open(path).size for path in pictures] == [(32, 32)] * 4
    kept = model.plan("evit", keep_rate=0.5).kept
    assert kept == load_run(tmp_path / "run").model.clone().plan(keep_rate=0.5, layers=(1, 2))


def test_a_run_of_a_method_that_learns_shows_it_where_it_learned(tmp_path):
    make_run(tmp_path / "run", model=dict(reducer="patchmerger", keep_rate=0.5))
    model = SideBySide(spec_of_run(str(tmp_path / "run")))
    assert model.methods[0] == "patchmerger"
    assert demo.beginning(model) == ("keep_rate", 0.5)
    assert "evit" in model.methods
    model.look(model.view(pixels(16, 16, 3)), model.plan("patchmerger", keep_rate=0.5))
    with pytest.raises(InputError, match="learns, and these parameters are of no training"):
        model.plan("patchmerger", keep_rate=0.8)


def test_several_models_are_there_to_choose_from(weights, tmp_path):
    flags = ["--model=tiny", f"--weights={weights}"]
    make_run(tmp_path / "run")
    run = f"--workdir={tmp_path / 'run'}"
    options = demo.parse([*flags, *flags, run, run])
    models = demo.open_models(options)
    runs = [str(tmp_path / "run"), f"{tmp_path / 'run'} (2)"]
    assert list(models) == ["tiny", "tiny (2)", *runs]
    assert demo.beginning(models["tiny"]) == ("share", 0.5)
    names = [path.rpartition("/")[2] for path in demo.examples(options, models, tmp_path)]
    assert names == ["chelsea.jpg", "coffee.jpg", "0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "give --model=NAME and --weights=FILE, or --workdir=DIR"),
        (["--model=tiny"], "--weights=FILE is needed: random weights would show nothing"),
        (["--model=tiny", "--model=tiny", "--weights=w"], "2 --model and 1 --weights"),
        (["--weights=w"], "give --model=NAME"),
        (["--model=tiny", "--weights=nowhere.npz"], "nowhere.npz"),
        (["--workdir=nowhere"], "nowhere is no training run"),
        (["--port=0"], "--port must be from 1 to 65535"),
        (["--share"], "unrecognized arguments: --share"),
    ],
)
def test_what_is_missing_is_said_before_there_is_a_page(flags, text, weights):
    del weights
    with pytest.raises(InputError) as error:
        demo.open_models(demo.parse(flags))
    assert text in str(error.value)


def test_a_broken_example_is_refused_at_once(tiny, weights, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    options = demo.parse(["--model=tiny", f"--weights={weights}", str(tmp_path / "x.png")])
    with pytest.raises(InputError, match=r"x\.png cannot be read as an image"):
        demo.examples(options, dict(tiny=tiny), tmp_path)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--model=deit_tiny_patch16_224", "--weights=x"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == ('error: the page needs Gradio: pip install -e ".[demo]"\n')


@pytest.fixture
def served(tiny, tmp_path, monkeypatch):
    """The page with one example, and a client of it."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    pytest.importorskip("gradio")
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = demo.build_page(dict(tiny=tiny), [photograph(tmp_path)])
    url = demo.launch(page, "127.0.0.1", port, wait=False)
    assert url == f"http://127.0.0.1:{port}/"
    yield Client(url, verbose=False, download_files=str(tmp_path)), page, port
    page.close(verbose=False)


def test_the_page_answers_and_says_what_is_wrong(served, tiny, tmp_path):
    from gradio_client import handle_file

    client, page, port = served

    def ask(picture, method="evit", value=0.5):
        image = picture and handle_file(str(picture))
        return client.predict("tiny", method, "keep_rate", value, image, api_name="/show")

    status, shown = ask(tmp_path / "photograph.png")
    assert "tiny, evit" in status
    assert shown.count("<figure>") == 4
    (tmp_path / "broken.png").write_text("no picture")
    status, shown = ask(tmp_path / "broken.png")
    assert "cannot be read as an image" in status
    assert not shown
    assert "Drop a picture" in ask(None)[0]
    assert page.share_url is None
    assert "googleapis" not in page.theme_css
    assert not page.analytics_enabled
    with pytest.raises(InputError, match=rf"no page at 127\.0\.0\.1:{port}"):
        demo.launch(demo.build_page(dict(tiny=tiny), []), "127.0.0.1", port, wait=False)
