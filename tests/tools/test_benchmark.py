# SPDX-License-Identifier: Apache-2.0
"""The comparison of models, keep rates and reducers: what is compared, timed and reported."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evit_jax.errors import InputError
from evit_jax.measure import comparison, programs, training_steps
from evit_jax.measure.chips import param_shapes
from evit_jax.models import build_model, init_params, preprocessing
from evit_jax.plan.flops import logit_macs, macs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.tools import benchmark
from evit_jax.training.trained import ModelSpec, spec_of_name, spec_of_run
from tests.measure.test_chip_report import Chip
from tests.support.compilers import needs_cuda_compiler
from tests.support.trained_run import make_run
from tests.tools.test_evaluate import tool

SIZES = dict(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, num_classes=5)
TINY = "vit:" + ",".join(f"{name}={value}" for name, value in SIZES.items())


def comparisons_of(**changes):
    settings = dict(
        dtypes=[jnp.dtype("float32")], modes=["inference"], batch_sizes=(2,), reducers=["evit"],
        keep_rates=(0.5,),
    )  # fmt: skip
    return comparison.comparisons_of([spec_of_name(TINY)], **settings | changes)


def test_the_tool_reports_all_combinations_and_dense_unasked(tmp_path):
    accuracies = tmp_path / "accuracies.json"
    rows = [dict(keep_rate=1, reducer="evit", top1=0.8), dict(keep_rate=0.5, top1=0.7)]
    accuracies.write_text(json.dumps(dict(model=TINY, results=rows)))
    code, figures, err = tool(
        "benchmark", f"--model={TINY}", "--keep_rates=0.5", "--reducers=evit,tome:r=3",
        "--batch_sizes=1,4", "--rounds=4", "--seconds=0.001", f"--accuracies={accuracies}",
        f"--plot={tmp_path / 'x.png'}", f"--out={tmp_path / 'x.md'}",
        f"--json={tmp_path / 'x.json'}",
    )  # fmt: skip
    assert code == 0, err
    results = figures["results"]
    expected = [
        (size, *variant)
        for size in (1, 4)
        for variant in (("dense", 1, 0.8), ("evit", 0.5, 0.7), ("tome:r=3", None, None))
    ]
    got = [(r["batch_size"], r["reducer"], r["keep_rate"], r["top1"]) for r in results]
    assert got == expected
    assert [row["tokens"] for row in results[:3]] == [[17], [10], [14]]
    for number, row in enumerate(results):
        assert (row["model"], row["dtype"], row["mode"]) == (TINY, "float32", "inference")
        # On a CPU both are of the same calls.
        each = row["batch_size"] / row["images_per_second"]
        assert row["latency_ms"] == pytest.approx(1000 * each, rel=1e-6)
        assert row["flops"] < 2 * row["macs"] * row["batch_size"]  # logits need less
        assert row["flops_per_second"] == pytest.approx(row["flops"] / each, rel=1e-6)
        peak = figures["peak_flops_per_second"]["float32"]
        assert row["peak_share"] == pytest.approx(row["flops_per_second"] / peak)
        assert row["xla_flops"] == pytest.approx(row["flops"], rel=0.5)
        assert row["macs_ratio"] == results[0]["macs"] / row["macs"]
        assert row["compile_seconds"] > 0.001
        for name in ("images_per_second", "latency_ms", "speedup"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high
        if number % 3 == 0:
            assert row["speedup_range"] == [1, 1]
    dense, evit = (build_model("vit", **SIZES, keep_rate=rate) for rate in (1, 0.5))
    assert results[1]["macs_ratio"] == macs(dense) / macs(evit) > 1

    assert (figures["platform"], figures["jax"], figures["rounds"]) == ("cpu", jax.__version__, 4)
    assert figures["noisy"] == (max(figures["noise"].values()) > 0.1)
    assert ("warning: the machine is too noisy" in err) == figures["noisy"]
    assert json.loads((tmp_path / "x.json").read_text()) == figures
    assert (tmp_path / "x.md").read_text().count("| tome:r=3 |") == 2
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 5


def test_a_speed_up_is_the_median_over_rounds_and_flops_count_the_backward_pass():
    one = comparisons_of(modes=["training"], batch_sizes=(4,))[0]
    program = programs.Program(lambda: None, 1.5, 100, None)
    seconds = {"dense": np.array([1.0, 2, 10]), "evit 0.5": np.array([0.5, 2, 2])}
    awaited = {name: 2 * values for name, values in seconds.items()}
    compiled = dict.fromkeys(seconds, program)
    dense, evit = comparison.rows_of(one, compiled, awaited, seconds)
    assert (dense["speedup"], evit["speedup"]) == (1, 2)  # of 2, 1 and 5
    assert evit["speedup_range"] == [1, 5]
    assert evit["images_per_second_range"] == [2, 8]
    assert (evit["images_per_second"], evit["latency_ms"]) == (2, 4000)
    assert evit["flops"] == 4 * 3 * 2 * logit_macs(one.variants[1].model)
    assert evit["flops_per_second"] == evit["flops"] / 2
    assert (evit["compile_seconds"], evit["xla_flops"]) == (1.5, None)


def test_inference_returns_the_models_logits_with_weights_in_the_compute_dtype():
    devices = DataParallel(jax.devices()[:1])
    model = build_model("vit", **SIZES, keep_rate=0.5)
    params = devices.init(lambda key: init_params(model, key), jax.random.key(0))
    images = devices.init(lambda key: jax.random.normal(key, (2, 16, 16, 3)), jax.random.key(1))
    expected, _ = jax.jit(model.apply)({"params": params}, images)
    program = programs.inference(model, params, images, devices)
    np.testing.assert_allclose(program.call(), expected, atol=1e-5)
    assert program.peak_memory_bytes > 4 * sum(leaf.size for leaf in jax.tree.leaves(params))

    half = programs.cast(params, jnp.dtype("bfloat16"), devices)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    low = programs.inference(model.clone(dtype=jnp.bfloat16), half, images, devices)
    assert low.call().dtype == jnp.float32  # the head's
    np.testing.assert_allclose(low.call(), expected, atol=0.05)


def test_training_is_the_real_step_and_hands_one_state_on():
    devices = DataParallel(jax.devices()[:1])
    dense = build_model("vit", **SIZES | dict(depth=2))  # reducing in the last block saves nothing
    params = devices.init(lambda key: init_params(dense, key), jax.random.key(0))
    before = jax.tree.map(np.asarray, params)
    batch = training_steps.synthetic_batch(dense.image_size, 2, dense.num_classes, devices)
    assert (batch["image"].dtype, batch["image"].shape) == (jnp.uint8, (2, 16, 16, 3))
    training = training_steps.Training(params, preprocessing("vit"), batch, devices)
    reduced = dense.clone(keep=dense.plan(keep_rate=0.5))
    steps = [training.program(model) for model in (dense, reduced)]
    for program in steps * 2:
        assert np.isfinite(program.call()["loss"])
    assert training.state["step"] == 4
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, training.state["params"])
    assert max(jax.tree.leaves(changes)) > 0
    jax.tree.map(np.testing.assert_array_equal, before, params)  # for the next batch size
    assert steps[0].xla_flops > steps[1].xla_flops


def test_all_modes_and_dtypes_are_measured_on_the_same_parameters():
    held = comparisons_of(
        modes=["inference", "training"], dtypes=[jnp.dtype("bfloat16")], keep_rates=(1,)
    )
    rows, peaks = comparison.measure(held, rounds=2, seconds=0.001)
    assert [row["mode"] for row in rows] == ["inference", "training"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert rows[1]["flops"] == 3 * rows[0]["flops"]
    assert rows[1]["xla_flops"] > 2 * rows[0]["xla_flops"]
    assert rows[1]["peak_memory_bytes"] > rows[0]["peak_memory_bytes"]
    assert {dtype: speeds.shape for dtype, speeds in peaks.items()} == dict(bfloat16=(2, 2))


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch, capsys):
    compile_all = comparison.compile_all

    def limited(one, *args):
        if one.batch_size > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return compile_all(one, *args)

    monkeypatch.setattr(comparison, "compile_all", limited)
    held = comparisons_of(batch_sizes=(4, 1), keep_rates=(1,))
    rows, peaks = comparison.measure(held, rounds=1, seconds=0.001)
    assert [row["batch_size"] for row in rows] == [1]
    assert peaks["float32"].shape == (1, 1)
    assert "with batch size 4 in inference needs more memory" in capsys.readouterr().err


def test_programs_kept_on_disk_do_not_shorten_compiling():
    folder = Path(os.environ["EVIT_JAX_TEST_PROGRAMS"])

    def compiled(number):
        def only_compiled_here(x):  # a name of its own, as other tests keep programs there too
            return x * number + 1

        jax.jit(only_compiled_here).lower(jnp.zeros(3)).compile()
        return set(folder.glob("jit_only_compiled_here-*"))

    before = compiled(3.5)
    with programs.without_program_cache():
        assert compiled(4.5) == before
    assert compiled(5.5) > before


def test_reducers_with_a_schedule_take_no_keep_rate():
    tiny = spec_of_name(TINY)
    variants = comparison.variants_of(
        tiny, reducers=["evit", "evit:fuse=False", "tome:r=2"], keep_rates=(1, 0.7, 0.5)
    )
    assert [variant.name for variant in variants] == [
        "dense", "evit 0.7", "evit 0.5", "evit:fuse=False 0.7", "evit:fuse=False 0.5", "tome:r=2"
    ]  # fmt: skip
    assert [variant.model.tokens_per_block[0] for variant in variants] == [17, 14, 10, 13, 9, 15]
    assert [v.name for v in comparison.variants_of(tiny, reducers=["evit"])] == [
        "dense",
        "evit 0.7",
    ]
    named = ModelSpec("x", dict(name="deit_tiny_patch16_224", image_size=(64,)))
    named = comparison.variants_of(named, reducers=["tome:r=13"])
    assert [variant.model.image_size for variant in named] == [(64, 64)] * 2


def test_a_run_is_timed_at_its_own_rate_or_plan_unless_told_otherwise(tmp_path):
    def variants(workdir, **settings):
        found = comparison.variants_of(spec_of_run(str(workdir)), **settings)
        return [(variant.name, variant.model.tokens_per_block) for variant in found]

    dense, own = ("dense", (17,) * 4), ("evit 0.7", (17, 14, 12, 12))  # in blocks 1 and 2
    make_run(tmp_path / "rate", checkpoint=False)
    assert variants(tmp_path / "rate") == [dense, own]
    merged = ("tome:r=2", (15, 13, 11, 9))  # in all blocks
    assert variants(tmp_path / "rate", reducers=["tome:r=2", "evit"]) == [dense, merged, own]
    half = ("evit 0.5", (17, 10, 7, 7))
    assert variants(tmp_path / "rate", keep_rates=(1, 0.5)) == [dense, half]
    make_run(tmp_path / "counts", checkpoint=False, model=dict(keep_rate=None, tokens=(9, 5)))
    assert variants(tmp_path / "counts") == [dense, ("evit", (17, 11, 7, 7))]
    assert variants(tmp_path / "counts", keep_rates=(0.5,)) == [dense, half]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the tool in this process, with few and short rounds: the JSON object."""

    def call(*arguments):
        quick = ["--batch_sizes=2", "--rounds=1", "--seconds=0.001"]
        monkeypatch.setattr(sys, "argv", ["benchmark", *quick, *map(str, arguments)])
        benchmark.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_chips_are_estimated_beside_what_is_measured_or_alone(run, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "Target", lambda name: chips[name])
    chips = dict(v5e=Chip("cycles"), h200=Chip("bytes"))
    for chip in chips.values():
        chip.compiler = f"compiler of {chip.unit}"
    flags = f"--model={TINY}", "--keep_rates=0.5", "--chips=v5e,h200", f"--out={tmp_path / 'x.md'}"
    both = run(*flags)
    assert both["compilers"]["h200"] == "compiler of bytes"
    assert [row["chips"]["v5e"]["cycles"] for row in both["results"]] == [1700, 1000]
    assert all(row["images_per_second"] > 0 for row in both["results"])
    assert (tmp_path / "x.md").read_text().count("| evit |") == 3

    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("measured"))
    alone = run(*flags, "--rounds=0", "--operations=1")
    assert alone["rounds"] == 0
    assert [row["chips"]["h200"]["speedup"] for row in alone["results"]] == [1, 1.7]
    assert alone["results"][1]["macs_ratio"] == both["results"][1]["macs_ratio"]
    assert alone["results"][1]["chips"]["h200"]["operations"] == [dict(name="product", bytes=750)]
    assert "images_per_second" not in alone["results"][0]
    assert "images/s" not in (tmp_path / "x.md").read_text()


@needs_cuda_compiler
def test_a_gpu_that_is_not_here_is_estimated_by_its_compiler():
    two = TINY.replace("depth=1", "depth=2")  # reducing in the last block costs nothing
    code, figures, err = tool(
        "benchmark", f"--model={two}", "--keep_rates=0.5", "--batch_sizes=4", "--rounds=0",
        "--dtypes=bfloat16", "--chips=h200", "--operations=3",
    )  # fmt: skip
    assert code == 0, err
    dense, reduced = (row["chips"]["h200"] for row in figures["results"])
    shapes = param_shapes(build_model("vit", **SIZES | dict(depth=2)))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert dense["argument_bytes"] == 2 * params + 4 * 4 * 16 * 16 * 3
    assert dense["kernels"] < reduced["kernels"]
    assert dense["argument_bytes"] < dense["bytes"] < 100 * dense["argument_bytes"]
    assert dense["loops"] == reduced["loops"] == 0
    assert len(reduced["operations"]) == 3
    assert dense["fits"]
    assert "estimated by the compiler" in err.lower()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_tool_times_a_run_beside_the_accuracies_of_its_plan(checkpoint, run, tmp_path):
    make_run(tmp_path / "run", checkpoint=checkpoint)
    label = str(tmp_path / "run")
    accuracies = tmp_path / "accuracies.json"
    rows = [
        dict(keep_rate=rate, reducer="evit", layers=layers, multiple_of=1, top1=top1)
        for rate, layers, top1 in ((1.0, None, 0.9), (0.7, None, 0.8), (0.7, [0, 3], 0.7))
    ]
    accuracies.write_text(json.dumps(dict(model=label, results=rows)))
    flags = f"--workdir={label}", f"--accuracies={accuracies}"
    results = run(*flags)["results"]
    assert [(row["model"], row["reducer"], row["keep_rate"], row["top1"]) for row in results] == [
        (label, "dense", 1, 0.9), (label, "evit", 0.7, 0.8)
    ]  # fmt: skip
    assert results[1]["tokens"] == [17, 14, 12, 12]
    if checkpoint:
        return
    results = run(*flags, "--layers=0,3")["results"]
    assert [(row["tokens"], row["top1"]) for row in results] == [
        ([17] * 4, 0.9), ([14, 14, 14, 12], 0.7)
    ]  # fmt: skip
    accuracies.write_text(json.dumps(dict(model=label, results=rows[2:])))
    with pytest.raises(InputError, match="has none of the variants to be timed"):
        run(*flags)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give --model=NAME, or --workdir=DIR of a training run"),
        (["--workdir=/nowhere"], "/nowhere is no training run"),
        (["--workdir=x", f"--model={TINY}"], "leave out --model"),
        ([f"--model={TINY}", "--mode="], "unknown mode ''"),
        (["--model=deit_tiny"], "unknown model 'deit_tiny'"),
        (["--model=vit:widht=3"], "did you mean 'width'"),
        (["--model=vit:keep_rate=0.5"], "keep_rate is no size of the model"),
        ([f"--model={TINY}", "--keep_rates=70"], "did you mean 0.7?"),
        ([f"--model={TINY}", "--keep_rates=a"], "expected numbers"),
        ([f"--model={TINY}", "--keep_rates=0.5", "--reducers=tome:r=2"], "tome:r=2 takes none"),
        ([f"--model={TINY}", "--reducers=evti"], "did you mean 'evit'?"),
        ([f"--model={TINY}", "--batch_sizes=0"], "--batch_sizes must be 1 or more"),
        ([f"--model={TINY}", "--dtypes=float31"], "did you mean 'float32'?"),
        ([f"--model={TINY}", "--mode=trianing"], "did you mean 'training'?"),
        ([f"--model={TINY}", "--rounds=0"], "--rounds must be 1 or more"),
        ([f"--model={TINY}", "--rounds=-1", "--chips=v5e"], "--rounds must be 1 or more"),
        ([f"--model={TINY}", "--operations=3"], "--operations=N needs --chips"),
        ([f"--model={TINY}", "--chips=v7"], "unknown chip 'v7'"),
        ([f"--model={TINY}", "--chips=v5e:2x2"], "costs are of one chip; ask for v5e"),
        ([f"--model={TINY}", "--out=/nowhere/x.md"], "in a folder that exists"),
        ([f"--model={TINY}", "--out=x.txt"], "--out must be a .md file"),
        ([f"--model={TINY}", "--plot=x.png"], "--plot needs --accuracies"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(arguments, text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError) as caught:
        benchmark.main()
    assert text in str(caught.value)


def test_accuracies_of_something_else_are_refused_in_one_line(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(dict(results=[dict(keep_rate=0.9, reducer="evit", top1=0.7)])))
    code, _, err = tool("benchmark", f"--model={TINY}", f"--accuracies={path}")
    assert code == 1
    assert "other.json has none of the variants to be timed" in err
    assert err.count("\n") == 1
