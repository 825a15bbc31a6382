# SPDX-License-Identifier: Apache-2.0
"""A `measure.side_by_side.Look` as HTML: figures, classes, tokens and patches, without a script.

Colors and fonts are those of the page around it (Gradio's variables), so that it is as readable in
the dark as in the light. Pictures are inside, so that the page asks for nothing else.
"""

import base64
import html
import io

import numpy as np
from PIL import Image

from evit_jax.pictures import patches

STYLE = """<style>
.look { font-size: 14px; line-height: 1.4; color: var(--body-text-color); }
.look h3 { font-size: 15px; font-weight: 600; margin: 18px 0 6px; color: inherit; }
.look h3 > span, .look figcaption { font-size: 13px; font-weight: 400; }
.look .pale, .look figcaption { opacity: 0.7; }
.look .costs { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.look .costs > div { background: rgba(128, 128, 128, 0.1); border-radius: 4px;
  padding: 8px 12px 10px; }
.look .costs b { display: block; font-size: 24px; font-weight: 600; line-height: 1.3; }
.look .columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px; }
.look .class { position: relative; display: flex; justify-content: space-between; gap: 12px;
  padding: 3px 6px; margin-bottom: 3px; overflow-wrap: anywhere; }
.look .class > i { position: absolute; inset: 0 auto 0 0; background: rgba(0, 190, 175, 0.22); }
.look .class > span { position: relative; font-variant-numeric: tabular-nums; }
.look .blocks { display: flex; align-items: flex-end; gap: 6px; text-align: center; }
.look .blocks > div { flex: 1 1 0; min-width: 0; font-variant-numeric: tabular-nums; }
.look .bar { background: rgba(128, 128, 128, 0.22); height: 56px; display: flex;
  align-items: flex-end; margin: 2px 0; }
.look .bar > i { background: rgb(0, 190, 175); width: 100%; }
.look .panels { display: flex; flex-wrap: wrap; gap: 10px 8px; }
.look figure { margin: 0; width: min-content; }
.look figure img { display: block; max-width: none; margin: 0; }
.look figcaption { margin-top: 3px; white-space: nowrap; }
.look .key { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 14px; }
</style>"""
# State of a patch -> its color in the key, and what it says; all others are as they were.
KEY = {
    patches.FUSED: ("rgb(0, 190, 175)", "sharing a token, with a line around it"),
    patches.DROPPED: ("rgb(51, 51, 51)", "dropped"),
}
NUMBERED = 24  # blocks, beyond which there is no room for their numbers


def result(look) -> str:
    """All that is to be seen of one image, as an HTML fragment."""
    parts = [figures(look), tokens(look), panels(look)]
    if look.dense.top:
        parts.insert(1, classes(look))
    return f'{STYLE}<div class="look">{"".join(parts)}</div>'


def message(text: str, *, style: str = "opacity: 0.7") -> str:
    """One line above the result, or in its place; the text is escaped."""
    return f'<div style="min-height: 22px; {style}">{html.escape(text)}</div>'


def figures(look) -> str:
    """Costs of the reduced model, and how far its output is from the dense one's."""
    dense, reduced = look.dense, look.reduced
    faster = dense.milliseconds / reduced.milliseconds
    tiles = [
        (
            "Multiply-accumulates (MACs)",
            giga(reduced.macs),
            f"{reduced.macs / dense.macs:.0%} of {giga(dense.macs)}",
        ),
        (
            "One image takes",
            f"{reduced.milliseconds:.3g} ms",
            f"dense {dense.milliseconds:.3g} ms: {faster:.2f} times as fast",
        ),
    ]
    if look.kl is None:
        tiles.append(
            ("Cosine similarity", f"{look.cosine:.4f}", "of the features to the dense ones")
        )
    else:
        same = look.dense.top[0][0] == look.reduced.top[0][0]
        first = "the same first class" if same else "another first class"
        tiles.append(("KL from dense to reduced", f"{look.kl:.3g}", f"nats; {first}"))
    shown = (
        f'<div><span class="pale">{title}</span><b>{value}</b>'
        f'<span class="pale">{about}</span></div>'
        for title, value, about in tiles
    )
    return f'<div class="costs">{"".join(shown)}</div>'


def giga(macs: int) -> str:
    """1253683200 -> "1.254 G", and small models in millions."""
    return f"{macs / 1e9:.4g} G" if macs >= 1e8 else f"{macs / 1e6:.4g} M"


def classes(look) -> str:
    """The most probable classes, dense and reduced beside each other."""
    columns = []
    for title, outcome in (("Dense", look.dense), ("Reduced", look.reduced)):
        lines = [
            f'<div class="class"><i style="width: {100 * share:.1f}%"></i>'
            f"<span>{html.escape(name)}</span><span>{share:.1%}</span></div>"
            for name, share in outcome.top
        ]
        columns.append(f"<div><h3>{title}</h3>{''.join(lines)}</div>")
    return f'<div class="columns">{"".join(columns)}</div>'


def tokens(look) -> str:
    """A bar for each block: the tokens after it, in front of those of the dense model."""
    bars = []
    numbered = len(look.dense.tokens) <= NUMBERED
    for block, (full, left) in enumerate(zip(look.dense.tokens, look.reduced.tokens, strict=True)):
        bar = f'<div class="bar"><i style="height: {100 * left / full:.1f}%"></i></div>'
        over, under = (left, f'<span class="pale">{block}</span>') if numbered else ("", "")
        title = f"{left} of {full} tokens after block {block}"
        bars.append(f'<div title="{title}">{over}{bar}{under}</div>')
    prefix = {0: "", 1: ", with the class token"}.get(look.prefix, f", {look.prefix} in front")
    return (
        f'<h3>Tokens after each block <span class="pale">of {look.dense.tokens[0]}{prefix}</span>'
        f'</h3><div class="blocks">{"".join(bars)}</div>'
    )


def panels(look) -> str:
    """The image as the model sees it, and what is left of it after each reducing block."""
    cell = patches.cell_size(look.view.size[::-1], look.grid)
    base = patches.base_panel(look.view, look.grid, cell)
    shown = [figure(base, "as the model sees it")]
    found = set()
    for block, owner in zip(look.blocks, look.owners, strict=True):
        states = patches.patch_states(owner)
        found |= set(states.tolist())
        holding = len(np.unique(owner[owner >= 0]))
        caption = f"block {block}: {holding} token{'s' if holding != 1 else ''}"
        shown.append(figure(patches.patches_panel(base, owner, look.grid, cell), caption))
    key = "".join(
        f'<span class="key" style="background: {color}"></span>{text}'
        for state, (color, text) in KEY.items()
        if state in found
    )
    return (
        f'<h3>Patches after each reducing block<span class="pale">{key}</span></h3>'
        f'<div class="panels">{"".join(shown)}</div>'
    )


def figure(panel: np.ndarray, caption: str) -> str:
    """A panel (H, W, 3) uint8 with a line below it."""
    content = io.BytesIO()
    Image.fromarray(panel).save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode()
    text = html.escape(caption)
    size = f'width="{panel.shape[1]}" height="{panel.shape[0]}"'
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}" {size}>'
        f"<figcaption>{text}</figcaption></figure>"
    )
