# SPDX-License-Identifier: Apache-2.0
"""Writes tests/fixtures/t2t: small T2T-ViTs of their authors' code, and what they answer.

git clone https://github.com/yitu-opensource/T2T-ViT
python -m tests.scripts.t2t_fixtures T2T-ViT

Needs torch and timm (2.14 and 1.0.31 wrote the committed files). There is a model with either layer
of tokens to token, all of it random, in numbers that float16 holds. KIND.pth.tar is a checkpoint as
their code saves it, KIND.npz, computed in float64 in evaluation mode, has

    logits, grad/NAME            and gradients of the sum of their squares
    evit/logits, evit/kept_I     EViT at 0.7 in blocks 1, 2 and 3, and the tokens that it kept
    evit/grad/NAME

images.npy has what they look at, positions.npy the fixed positions of t2t_vit_14.
tests/models/test_t2t.py reads the files.
"""

import argparse
from pathlib import Path

import numpy as np

from tests.scripts.lvvit_fixtures import REDUCING, evit, imported, randomize

FILES = Path(__file__).parents[1] / "fixtures" / "t2t"
SIZES = dict(image_size=64, width=16, depth=4, num_heads=2, num_classes=5, token_width=6)


def answers(model, images) -> dict[str, np.ndarray]:
    """What the file of one model has."""
    found = {}
    for label in ("", "evit/"):
        model.zero_grad()
        if label:
            tokens, kept = evit(model, model.tokens_to_token(images))
            logits = model.head(tokens[:, 0])
            found |= {f"evit/kept_{i}": k.numpy() for i, k in zip(REDUCING, kept, strict=True)}
        else:
            logits = model(images)
        (logits**2).sum().backward()
        found[f"{label}logits"] = logits.detach().numpy().astype(np.float32)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # fixed ones have none
                found[f"{label}grad/{name}"] = parameter.grad.numpy().astype(np.float32)
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a checkout of yitu-opensource/T2T-ViT")
    torch.Tensor.float = lambda tensor: tensor  # their performer takes some values to float32
    (module,) = imported(parser.parse_args().folder, "models.t2t_vit")
    FILES.mkdir(exist_ok=True)
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float16)
    np.save(FILES / "images.npy", images)
    positions = module.get_sinusoid_encoding(n_position=197, d_hid=384)
    np.save(FILES / "positions.npy", positions.numpy()[:, ::14, :24])
    for kind in ("performer", "transformer"):
        model = module.T2T_ViT(
            img_size=SIZES["image_size"], tokens_type=kind, embed_dim=SIZES["width"],
            depth=SIZES["depth"], num_heads=SIZES["num_heads"], mlp_ratio=3.0,
            num_classes=SIZES["num_classes"], token_dim=SIZES["token_width"],
        )  # fmt: skip
        with torch.no_grad():
            state = randomize(model)
        halves = {name: tensor.half() for name, tensor in state.items()}
        torch.save(dict(arch="t2t", state_dict_ema=halves), FILES / f"{kind}.pth.tar")
        model.double().eval()
        theirs = torch.from_numpy(images).double().permute(0, 3, 1, 2)
        found = answers(model, theirs)
        np.savez_compressed(FILES / f"{kind}.npz", **found)
        print(f"wrote {FILES / kind}: logits up to {np.abs(found['logits']).max():.3f}")


if __name__ == "__main__":
    main()
