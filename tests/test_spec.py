# SPDX-License-Identifier: Apache-2.0
import pytest

from evit_jax.errors import InputError
from evit_jax.spec import numbers, parse_fields, parse_size, split_specs


def test_settings_are_read_as_what_they_look_like():
    fields = parse_fields("r=13,fuse=False,rate=0.5,debug,name=x, none=None")
    assert fields == dict(r=13, fuse=False, rate=0.5, debug=True, name="x", none=None)


def test_a_comma_separates_specs_but_not_their_fields():
    text = "evit, evit:fuse=False,tome:r=13,linear=0.5,random"
    assert split_specs(text) == ["evit", "evit:fuse=False", "tome:r=13,linear=0.5", "random"]
    assert split_specs("vit:width=48,depth=2,deit_tiny_patch16_224") == [
        "vit:width=48,depth=2",
        "deit_tiny_patch16_224",
    ]
    assert split_specs(" ,") == []


def test_image_sizes_are_one_side_or_height_and_width():
    assert parse_size("224") == (224,)
    assert parse_size("224,320") == (224, 320)
    assert parse_size("") is parse_size(None) is None
    for text in ("big", "1,2,3", ",", "224x320"):
        with pytest.raises(InputError, match=f"like 224, or 224,320.*got '{text}'"):
            parse_size(text)


def test_lists_of_numbers():
    assert numbers("1,0.7", float) == (1.0, 0.7)
    assert numbers("", int) == ()
    with pytest.raises(InputError, match=r"commas between them, got '3;6'"):
        numbers("3;6", int)
