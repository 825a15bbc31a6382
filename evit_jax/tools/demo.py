# SPDX-License-Identifier: Apache-2.0
"""A page to try it: a picture, a method and a slider; dense and reduced beside each other.

python -m evit_jax.tools.demo --model=deit_tiny_patch16_224 --weights=FILE [--classes=FILE.json] \\
    [--port=7860] [IMAGE...]
python -m evit_jax.tools.demo --workdir=runs/digits
python -m evit_jax.tools.demo --model=NAME --weights=FILE --model=NAME --weights=FILE   to choose

Needs `pip install -e ".[demo]"`. The page is for this machine alone unless --host says otherwise,
and asks nothing of any other; pictures are forgotten when the program ends. It offers the methods
that need no training, and a run's own. Milliseconds are those of one image alone on this device,
the median of several turns after compilation. IMAGEs are examples on the page; default two
photographs, or test images of a run. --classes is a JSON list of names, in class order; a run has
those of its data, models of 1000 classes by name those of ImageNet, others have numbers.

Once the page is there, the last line of standard output is a JSON object with its `url`. Ctrl-C
ends it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from PIL import Image

import evit_jax.pictures
from evit_jax import cli
from evit_jax.data import read_classes
from evit_jax.errors import InputError
from evit_jax.measure.side_by_side import SideBySide
from evit_jax.pictures.side_by_side import message, result
from evit_jax.storage import read
from evit_jax.tools.visualize import class_names, varied_examples
from evit_jax.training.trained import ModelSpec, open_spec, open_test_data

EXAMPLES = 4  # of a run's test images
LARGEST = "50mb"  # picture that is taken
# What the slider sets -> its text and where it begins.
KINDS = {
    "share": ("Share of the dense model's MACs", 0.5),
    "keep_rate": ("Keep rate of each reducing block", 0.7),
}
LOWEST, HIGHEST = 0.1, 0.95
CHOICES = [("MACs", "share"), ("keep rate", "keep_rate")]
NO_PICTURE = "Drop a picture on the left, or choose an example."
TITLE, WRONG = "font-weight: 600; font-size: 16px", "color: var(--error-text-color, #b91c1c)"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser, "model", "weights", "workdir", several=True)
    cli.add_model_flags(parser, "image_size", "num_classes", "dtype")
    add("--classes", metavar="FILE", help="JSON list of names, in class order")
    add("--port", type=int, default=7860, help="of the page")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default this one only")
    add("images", nargs="*", type=Path, metavar="IMAGE", help="examples")
    options = parser.parse_args(arguments)
    if not 0 < options.port < 65536:
        raise InputError(f"--port must be from 1 to 65535, got {options.port}")
    return options


def open_specs(options: argparse.Namespace) -> list[ModelSpec]:
    """The models and the runs that the flags name.

    Raises:
      InputError: none, or weights that are missing for one.
    """
    models, files, runs = options.model or [], options.weights or [], options.workdir or []
    if not models and not runs:
        raise InputError(
            "give --model=NAME and --weights=FILE, or --workdir=DIR of a training run; see --help"
        )
    if files and len(files) != len(models):
        raise InputError(
            f"there are {len(models)} --model and {len(files)} --weights: each model needs its own"
        )
    pairs = zip(models, files or [None] * len(models), strict=True)
    asked = [dict(model=model, weights=file) for model, file in pairs]
    asked += [dict(weights=None, workdir=run) for run in runs]
    return [open_spec(argparse.Namespace(**vars(options) | one_model(one))) for one in asked]


def one_model(given: dict) -> dict:
    """Flags of a single model, in place of all that were given."""
    return dict.fromkeys(("model", "weights", "workdir")) | given


def open_models(options: argparse.Namespace) -> dict[str, SideBySide]:
    """Label -> model with its weights.

    Raises:
      InputError: weights that do not fit, or names for another number of classes.
    """
    given = options.classes and read_classes(options.classes, unique=False)
    found = {}
    for spec in open_specs(options):
        print(f"loading {spec.label}", file=sys.stderr)
        classes = spec.build(keep_rate=1).num_classes
        label, number = spec.label, 1
        while label in found:
            label, number = f"{spec.label} ({number + 1})", number + 1
        found[label] = SideBySide(spec, given or class_names(spec, classes))
    return found


def examples(options: argparse.Namespace, models: dict[str, SideBySide], folder: Path) -> list[str]:
    """Paths of the pictures to choose from; those of runs are written into the folder."""
    if options.images:
        for path in options.images:
            next(iter(models.values())).view(read(path), str(path))
        return [str(path.resolve()) for path in options.images]
    found, seen = [], []
    for model in models.values():
        if model.spec.config is None or model.spec.config["data"] in seen:
            continue
        seen.append(model.spec.config["data"])
        try:
            source = open_test_data(model.spec.config)
        except (InputError, OSError) as error:
            print(f"no examples of {model.spec.label}: {error}", file=sys.stderr)
            continue
        for example in varied_examples(source, EXAMPLES):
            path = folder / f"{len(found)}.png"
            picture = example["image"]
            if isinstance(picture, bytes):
                path.write_bytes(picture)
            else:
                Image.fromarray(np.asarray(picture).squeeze()).save(path)
            found.append(str(path))
    if any(model.spec.config is None for model in models.values()):
        photographs = Path(evit_jax.pictures.__file__).with_name("examples")
        found = sorted(map(str, photographs.glob("*.jpg"))) + found
    return found


def answers(
    models: dict[str, SideBySide], label: str, method: str, kind: str, value: float, path: str
) -> Iterator[tuple[str, str]]:
    """What the page shows, step by step: (the line of status, the result), as HTML.

    Args:
      kind, value: one of KINDS, and the slider.
      path: of the picture; None or "": there is none.
    """
    if not path:
        yield message(NO_PICTURE), ""
        return
    side_by_side = models[label]
    try:
        view = side_by_side.view(Path(path).read_bytes())
        model = side_by_side.plan(method, **{kind: value})
        if not side_by_side.compiled(model):
            for seconds in while_compiling(side_by_side, model):
                text = f"Compiling {method}, which is done once for each plan: {seconds} s"
                yield message(text), ""
        look = side_by_side.look(view, model)
    except (InputError, OSError) as error:
        yield message(" ".join(str(error).split()), style=WRONG), ""
        return
    yield message(f"{label}, {method}", style=TITLE), result(look)


def while_compiling(side_by_side: SideBySide, model) -> Iterator[int]:
    """Compiles in another thread; the seconds so far, every second."""
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(side_by_side.compile, model)
        while not job.done():
            yield int(time.monotonic() - start)
            wait([job], timeout=1)
        job.result()


def beginning(model: SideBySide) -> tuple[str, float]:
    """What the slider sets at first, and to what: a run's own keep rate, where it has one."""
    rate = model.spec.keep_rate
    if rate is not None and LOWEST <= rate <= HIGHEST:
        return "keep_rate", rate
    return "share", KINDS["share"][1]


def build_page(models: dict[str, SideBySide], pictures: list[str]):
    """The page, as Gradio's Blocks.

    Args:
      pictures: paths of the examples; the page begins with the first one.
    """
    import gradio as gr

    labels = list(models)
    first = models[labels[0]]
    with gr.Blocks(title="evit_jax", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.Image(
                    pictures[0] if pictures else None,
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=240,
                    buttons=[],
                )
                # Its own would open the file, and end in a traceback where it cannot be read.
                picture.preprocess = lambda payload: payload and payload.path
                if pictures:
                    gr.Examples([[path] for path in pictures], [picture], label="Examples")
                label = gr.Dropdown(labels, value=labels[0], label="Model")
                label.visible = len(labels) > 1
                method = gr.Dropdown(first.methods, value=first.methods[0], label="Method")
                sets, start = beginning(first)
                kind = gr.Radio(CHOICES, value=sets, label="The slider sets")
                text = KINDS[sets][0]
                slider = gr.Slider(LOWEST, HIGHEST, start, step=0.05, label=text, buttons=[])
            with gr.Column(scale=3, min_width=600):
                status = gr.HTML(message(NO_PICTURE), padding=False)
                shown = gr.HTML(padding=False)

        def show(*values):
            yield from answers(models, *values)

        def choose_model(label, method):
            methods = models[label].methods
            return gr.Dropdown(methods, value=method if method in methods else methods[0])

        def choose_kind(kind):
            text, value = KINDS[kind]
            return gr.Slider(label=text, value=value)

        asked = dict(
            fn=show,
            inputs=[label, method, kind, slider, picture],
            outputs=[status, shown],
            show_progress="hidden",
            concurrency_id="device",  # one at a time, or they would slow each other's clock
            concurrency_limit=1,
        )
        moved = [page.load, picture.change, method.input, slider.release]
        gr.on(moved, **asked, trigger_mode="always_last", api_name="show")
        hidden = dict(show_progress="hidden", api_visibility="private")
        label.input(choose_model, [label, method], method, **hidden).then(
            **asked, api_visibility="private"
        )
        kind.input(choose_kind, kind, slider, **hidden).then(**asked, api_visibility="private")
    return page


def launch(page, host: str, port: int, *, wait: bool) -> str:
    """Serves the page, and prints where as soon as it is there; returns its address.

    Args:
      wait: until Ctrl-C.

    Raises:
      InputError: the port is taken.
    """
    import gradio as gr

    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=plain,  # the default asks another machine for its fonts
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            max_file_size=LARGEST,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(f"no page at {host}:{port}, as with --port={port + 1}: {error}") from None
    print(json.dumps(dict(url=url)), flush=True)
    if wait:
        page.block_thread()
    return url


def check_gradio() -> None:
    """Raises InputError where Gradio is missing; else tells it to keep to itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError('the page needs Gradio: pip install -e ".[demo]"') from None


def serve(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="evit_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of the pictures that people drop
        check_gradio()
        models = open_models(options)
        page = build_page(models, examples(options, models, Path(folder)))
        launch(page, options.host, options.port, wait=True)


def main(arguments: list[str] | None = None) -> None:
    cli.guard(lambda: serve(parse(arguments)))


if __name__ == "__main__":
    main()
