# SPDX-License-Identifier: Apache-2.0
"""Weights from the Hugging Face hub, by name and commit."""

import re
import warnings
from pathlib import Path

from evit_jax.errors import InputError

NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([0-9a-f]{7,40}))?(?::(.+))?")
# Of a repository without FILE: weights whole or in parts, and what says whose they are.
FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


def download(name: str) -> str:
    """ "hf:OWNER/REPOSITORY[@COMMIT][:FILE]" -> a path in the hub's local cache.

    With FILE it is that file, without it a folder with config.json and model.safetensors, whole or
    in parts. What a name means without a commit may change from day to day: it warns, and says the
    commit that it got.

    Raises:
      InputError: a name of another form, the extra is missing, or the hub cannot be reached.
    """
    repository, commit, file = parts(name)
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f'{name} needs the extra "hub": pip install "evit_jax[hub]"; or download '
            f"{file or 'model.safetensors'} yourself and give its path"
        ) from None
    try:
        if file:
            path = huggingface_hub.hf_hub_download(repository, file, revision=commit)
        else:
            path = huggingface_hub.snapshot_download(
                repository, revision=commit, allow_patterns=list(FILES)
            )
    except Exception as error:  # the library's own errors, requests', the system's
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"could not get {file or 'the weights'} of {repository} at {commit or 'its newest'} "
            f"from the hub ({reason}); connect once to fill the local cache, or download it "
            "elsewhere and give the file's path"
        ) from None
    if not commit and (got := with_commit(name, path)) != name:
        text = f"{name} may be other weights tomorrow; these are {got}, which stays the same"
        warnings.warn(text, stacklevel=2)  # Python shows the same text once
    return path


def pinned(name: str) -> str:
    """The name with the commit that it means now; other names, such as paths, stay.

    Raises:
      InputError: see `download`.
    """
    if not name.startswith("hf:") or parts(name)[1]:
        return name
    return with_commit(name, download(name))


def pins(name: str, other: str) -> bool:
    """Whether `other` is `name` with a commit."""
    if not name.startswith("hf:") or not NAME.fullmatch(other):
        return False
    (repository, commit, file), there = parts(name), parts(other)
    return not commit and (repository, file) == (there[0], there[2])


def parts(name: str) -> tuple[str, str | None, str | None]:
    """Repository, commit and file of a name."""
    match = NAME.fullmatch(name)
    if not match:
        raise InputError(
            f"{name!r} is not of the form hf:OWNER/REPOSITORY@COMMIT, such as "
            "hf:timm/deit_small_patch16_224.fb_in1k@COMMIT with a commit from its history page"
        )
    return match[1], match[2], match[3]


def with_commit(name: str, path: str) -> str:
    """The name with the commit of a path in the cache, .../snapshots/COMMIT[/FILE]."""
    repository, _, file = parts(name)
    folders = Path(path).parts
    if "snapshots" not in folders[:-1]:
        return name
    commit = folders[len(folders) - folders[::-1].index("snapshots")]
    return f"hf:{repository}@{commit}" + (f":{file}" if file else "")
