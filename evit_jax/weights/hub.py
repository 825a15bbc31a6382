# SPDX-License-Identifier: Apache-2.0
"""Weights from the Hugging Face hub, by name and commit."""

import re

from evit_jax.errors import InputError


def download(name: str) -> str:
    """ "hf:OWNER/REPOSITORY@COMMIT[:FILE]" -> path of the file in the hub's local cache.

    FILE is model.safetensors unless given. The commit is required: what a name means without one
    may change from day to day.

    Raises:
      InputError: a name of another form, the extra is missing, or the hub cannot be reached.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})(?::(.+))?", name)
    if not match:
        raise InputError(
            f"{name!r} is not of the form hf:OWNER/REPOSITORY@COMMIT, such as "
            "hf:timm/deit_small_patch16_224.fb_in1k@COMMIT with a commit from its history page"
        )
    repository, commit, file = match[1], match[2], match[3] or "model.safetensors"
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f'{name} needs the extra "hub": pip install "evit_jax[hub]"; or download {file} '
            "yourself and give its path"
        ) from None
    try:
        return huggingface_hub.hf_hub_download(repository, file, revision=commit)
    except Exception as error:  # the library's own errors, requests', the system's
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"could not get {file} of {repository} at {commit} from the hub ({reason}); connect "
            "once to fill the local cache, or download it elsewhere and give the file's path"
        ) from None
