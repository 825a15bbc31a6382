# SPDX-License-Identifier: Apache-2.0
import pytest

from evit_jax.errors import InputError
from evit_jax.spec import numbers, parse_fields


def test_fields_keep_their_types():
    fields = parse_fields("r=13, linear=0.5,fuse=False,name=tome,debug")
    assert fields == dict(r=13, linear=0.5, fuse=False, name="tome", debug=True)


def test_lists_of_numbers():
    assert numbers("1,0.7", float) == (1.0, 0.7)
    assert numbers("", int) == ()
    with pytest.raises(InputError, match=r"commas between them, got '3;6'"):
        numbers("3;6", int)
