# SPDX-License-Identifier: Apache-2.0
"""Writes tests/fixtures/lvvit: a small LV-ViT of its authors' code, and what it answers.

git clone https://github.com/zihangJiang/TokenLabeling
python -m tests.scripts.lvvit_fixtures TokenLabeling

Needs torch and timm (2.14 and 1.0.31 wrote the committed files). The model has fewer filters and
smaller patches than any published one; all of it is random, running statistics, too, in numbers
that float16 holds. weights.pth.tar is a checkpoint as their code saves it. expected.npz, computed
in float64, has

    image, label_maps            4 images (B, H, W, 3); targets (B, 1 + P, C), of the class first
    logits                       evaluation
    swap                         (P,) the patches of the MixToken box
    train_cls, train_aux, loss   a training step's logits, swapped back as theirs are, and its loss
    grad/NAME, after/NAME        gradients, and the running statistics afterwards
    evit/logits, evit/kept_I     EViT at 0.7 in blocks 1, 2 and 3: evaluation logits and, of each of
                                 these blocks, the tokens kept, by falling class attention
    evit/grad/NAME               gradients of the sum of squares of the class token's logits

They pair image b with B - 1 - b, we pair 2j with 2j + 1: images are here in our order.
tests/models/test_lvvit.py reads the files.
"""

import argparse
import importlib
import math
import sys
import types
from pathlib import Path

import numpy as np

FILES = Path(__file__).parents[1] / "fixtures" / "lvvit"
SIZES = dict(image_size=32, patch_size=8, width=16, depth=4, num_heads=2, num_classes=5)
FILTERS, SKIP, BOX = 6, 2.0, (1, 0, 3, 3)  # rows from, columns from, rows to, columns to
REDUCING, RATE = (1, 2, 3), 0.7
OURS = [0, 2, 3, 1]  # their image b is our image OURS[b]


def stand_in(name: str, **attributes) -> None:
    """A module for what their files import and this script does not use."""
    sys.modules[name] = types.SimpleNamespace(**attributes)


def reference(folder: str):
    """Their modules of the model and the loss, with what newer timm lacks, and our box."""
    from timm.layers import DropPath, to_2tuple, trunc_normal_

    stand_in("timm.models.helpers", load_pretrained=None)
    stand_in("timm.models.registry", register_model=lambda function: function)
    stand_in(
        "timm.models.layers", DropPath=DropPath, to_2tuple=to_2tuple, trunc_normal_=trunc_normal_
    )
    sys.path.insert(0, folder)
    model = importlib.import_module("tlt.models.lvvit")
    model.rand_bbox = lambda size, lam: BOX
    return model, importlib.import_module("tlt.loss.cross_entropy")


def randomized(module):
    """Their model as small as SIZES says, every number of it random."""
    import torch

    model = module.LV_ViT(
        img_size=SIZES["image_size"], patch_size=SIZES["patch_size"], embed_dim=SIZES["width"],
        depth=SIZES["depth"], num_heads=SIZES["num_heads"], num_classes=SIZES["num_classes"],
        mlp_ratio=3.0, skip_lam=SKIP, return_dense=True, mix_token=True,
    )  # fmt: skip
    stem, conv, half = model.patch_embed, torch.nn.Conv2d, SIZES["patch_size"] // 2
    stem.conv1 = conv(3, FILTERS, 7, stride=2, padding=3, bias=False)
    stem.conv2, stem.conv3 = (conv(FILTERS, FILTERS, 3, padding=1, bias=False) for _ in range(2))
    stem.bn1, stem.bn2, stem.bn3 = (torch.nn.BatchNorm2d(FILTERS) for _ in range(3))
    stem.proj = conv(FILTERS, SIZES["width"], half, stride=half)
    rng = np.random.default_rng(0)
    state = model.state_dict()
    for name, tensor in state.items():
        values = torch.from_numpy(rng.normal(size=tensor.shape))
        if name.endswith("running_var"):
            values = 0.5 + values**2
        elif name.endswith("num_batches_tracked"):
            continue
        elif tensor.ndim > 1 and name.endswith("weight"):
            values = values / math.sqrt(math.prod(tensor.shape[1:]))
        elif name.endswith("weight"):  # of a norm
            values = 1 + 0.2 * values
        else:
            values = 0.3 * values
        tensor.copy_(values.half())
    return model.double(), state


def block_of(block, x, keep: int | None):
    """Their block on tokens x with EViT's rule between its branches: tokens, and those it kept."""
    import torch

    batch, count, _ = x.shape
    inner, entering = block.attn, block.norm1(x)
    qkv = inner.qkv(entering).reshape(batch, count, 3, inner.num_heads, inner.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = (
        ((q[:, :, :1] @ k.transpose(-2, -1)) * inner.scale).softmax(dim=-1)[:, :, 0, 1:].mean(1)
    )
    x, order = x + inner(entering) / block.skip_lam, None
    if keep is not None:
        patches = x[:, 1:]
        order = scores.argsort(dim=1, descending=True)
        chosen, rest = order[:, :keep], order[:, keep:]
        picked = torch.take_along_dim(patches, chosen[..., None], 1)
        others = torch.take_along_dim(patches, rest[..., None], 1)
        shares = torch.take_along_dim(scores, rest, 1)[..., None]
        fused = (others * shares).sum(dim=1, keepdim=True)
        x, order = torch.cat([x[:, :1], picked, fused], dim=1), chosen
    return x + block.mlp(block.norm2(x)) / block.skip_lam, order


def evit(model, images):
    """Class logits, patch logits and what each reducing block kept of EViT on their modules."""
    import torch

    x = model.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed
    kept = []
    for number, block in enumerate(model.blocks):
        keep = math.ceil(RATE * (x.shape[1] - 1)) if number in REDUCING else None
        x, order = block_of(block, x, keep)
        kept += [] if order is None else [order]
    x = model.norm(x)
    return model.head(x[:, 0]), model.aux_head(x[:, 1:]), kept


def in_our_order(array) -> np.ndarray:
    ours = np.empty_like(array)
    ours[OURS] = array
    return ours


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a checkout of zihangJiang/TokenLabeling")
    module, losses = reference(parser.parse_args().folder)
    with torch.no_grad():
        model, state = randomized(module)
    FILES.mkdir(exist_ok=True)
    halves = {k: v if "tracked" in k else v.half() for k, v in state.items()}
    torch.save(dict(epoch=0, arch="lvvit", state_dict=halves), FILES / "weights.pth.tar")

    rng, batch, classes = np.random.default_rng(1), 4, SIZES["num_classes"]
    grid = SIZES["image_size"] // SIZES["patch_size"]
    images = rng.normal(size=(batch, SIZES["image_size"], SIZES["image_size"], 3)).astype("float32")
    maps = rng.dirichlet(np.full(classes, 0.5), (batch, 1 + grid**2)).astype("float32")
    theirs = torch.from_numpy(images[OURS]).double().permute(0, 3, 1, 2)
    # Their targets are (B, C, 2 + P): the truth, which is not used, the class, patches.
    targets = torch.from_numpy(maps[OURS]).double().transpose(1, 2)
    targets = torch.cat([targets[..., :1], targets], dim=2)
    swap = np.zeros((grid, grid), bool)
    swap[BOX[0] : BOX[2], BOX[1] : BOX[3]] = True
    found = dict(image=images, label_maps=maps, swap=swap.ravel())

    model.eval()
    with torch.no_grad():
        found["logits"] = in_our_order(model(theirs).numpy())
    logits, patch_logits, kept = evit(model, theirs)
    (logits**2).sum().backward()
    with torch.no_grad():
        total = logits + 0.5 * patch_logits.max(dim=1)[0]
    found["evit/logits"] = in_our_order(total.numpy())
    found |= {
        f"evit/kept_{i}": in_our_order(k.numpy()) for i, k in zip(REDUCING, kept, strict=True)
    }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:  # of the patches' head
            found[f"evit/grad/{name}"] = parameter.grad.numpy().copy()
    model.zero_grad()

    model.train()
    loss = losses.TokenLabelCrossEntropy(classes=classes)
    answers = model(theirs)
    value = loss(answers, targets)
    value.backward()
    found["loss"] = value.item()
    found["train_cls"], found["train_aux"] = (in_our_order(a.detach().numpy()) for a in answers[:2])
    found |= {f"grad/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    found |= {f"after/{n}": b.numpy() for n, b in model.named_buffers() if "tracked" not in n}
    whole = ("int64", "bool")
    found = {
        k: a if (a := np.asarray(v)).dtype in whole else a.astype("float32")
        for k, v in found.items()
    }
    np.savez_compressed(FILES / "expected.npz", **found)
    print(
        f"wrote {FILES}: loss {value.item():.6f}, logits up to {np.abs(found['logits']).max():.3f}"
    )


if __name__ == "__main__":
    main()
