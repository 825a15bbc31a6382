# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from PIL import Image

from configs import digits
from evit_jax.errors import InputError
from evit_jax.tools import summarize

DENSE_MACS = 12_000_000


def run_of(workdir, top1, *, seed=0, keep_rate=0.7, macs=7_600_000, final=True, **model):
    """A folder as train.py leaves it: configuration and figures."""
    config = digits.get_config(f"keep_rate={keep_rate}")
    with config.unlocked():
        config.seed = seed
        config.model.update(model)
        config.run.threads = seed  # where and how fast; no other recipe
    figures = dict(step=9, final=final, test_top1=top1, dense_top1=top1 - 0.01, macs=macs)
    figures |= dict(dense_macs=DENSE_MACS, images_per_second=100.0 + seed, speedup=1.5)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    lines = [dict(step=1, train_loss=1.0), figures]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(workdir)


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the tool in this process: (the table's lines, the JSON object, standard error)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["summarize", *map(str, arguments)])
        summarize.main()
        out, err = capsys.readouterr()
        *lines, last = out.strip().split("\n")
        return lines, json.loads(last), err

    return call


def test_seeds_are_one_row_with_mean_and_spread(call, tmp_path):
    runs = [run_of(tmp_path / f"run{i}", top1, seed=i) for i, top1 in enumerate([0.9, 0.94, 0.95])]
    dense = run_of(tmp_path / "dense", 0.96, keep_rate=1, macs=DENSE_MACS)
    lines, figures, _ = call(*runs, dense)
    first, second = figures["rows"]
    assert (first["method"], first["kept"]) == ("dense", "")
    assert (second["method"], second["kept"]) == ("evit", "0.7")
    assert second["seeds"] == [0, 1, 2]
    assert second["top1"] == [0.9, 0.94, 0.95]
    assert second["images_per_second"] == 101.0
    assert figures["unfinished"] == []
    # Mean 93, and the sample's deviation of 90, 94 and 95: the root of (9 + 1 + 4) / 2.
    assert "93.00 ± 2.65" in lines[3]
    assert "90.00 to 95.00" in lines[3]
    assert "92.00" in lines[3]  # the same weights dense


def test_rows_say_what_differs_where_method_and_rate_do_not(call, tmp_path):
    runs = [run_of(tmp_path / str(width), 0.9, width=width) for width in (48, 96)]
    other = run_of(tmp_path / "other", 0.8, reducer="random")
    _, figures, _ = call(*runs, other)
    others = [(row["method"], row["others"]) for row in figures["rows"]]
    expected = [("evit", ["model.width=48"]), ("evit", ["model.width=96"]), ("random", [])]
    assert others == expected


def test_a_checkpoint_for_several_rates_is_a_method_of_its_own(call, tmp_path):
    runs = run_of(tmp_path / "one", 0.9), run_of(tmp_path / "several", 0.8)
    path = tmp_path / "several" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(sandwich=[1.0, 0.7])))
    _, figures, _ = call(*runs)
    methods = [(row["method"], row["kept"]) for row in figures["rows"]]
    assert methods == [("evit", "0.7"), ("evit one of [1.0, 0.7]", "")]


def test_runs_without_a_result_are_named(call, tmp_path):
    done = run_of(tmp_path / "done", 0.9)
    broken = run_of(tmp_path / "broken", 0.9, final=False, seed=1)
    with open(f"{broken}/metrics.jsonl", "a") as lines:
        lines.write('{"step": 10, "final": tr')  # cut off
    _, figures, err = call(done, broken)
    assert figures["unfinished"] == [broken]
    assert f"{broken} has no result yet" in err
    with pytest.raises(InputError, match="none of these runs has finished"):
        call(broken)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [str(path / "nowhere")], "is no training run: there is no such folder"),
        (
            lambda path: [run_of(path / "a", 0.9), run_of(path / "b", 0.8)],
            "b has the recipe and the seed 0 of another run",
        ),
        (lambda path: [run_of(path / "a", 0.9), "--out=a.jpg"], "is not the name of a .png"),
    ],
)
def test_mistakes_are_one_line(call, tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        call(*make(tmp_path))


@pytest.mark.parametrize("cost", ["macs", "images_per_second"])
def test_the_plot_has_a_line_for_each_method(call, tmp_path, cost):
    runs = [
        run_of(tmp_path / f"{rate}", rate, keep_rate=rate, macs=int(1e7 * rate))
        for rate in (0.5, 0.9)
    ]
    runs.append(run_of(tmp_path / "dense", 0.96, keep_rate=1, macs=DENSE_MACS))
    call(*runs, f"--out={tmp_path / 'plot.png'}", f"--cost={cost}")
    colors = {tuple(c) for c in np.asarray(Image.open(tmp_path / "plot.png")).reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0)} <= colors
