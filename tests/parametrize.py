"""Parametrisations that suites share, so that one name means the same in all of them."""

from __future__ import annotations

import pytest
import reference as ref

by_dtype = pytest.mark.parametrize("dtype", ref.NATIVE_DTYPES + ref.COMPLEX_DTYPES, ids=ref.name_of)
by_native_dtype = pytest.mark.parametrize("dtype", ref.NATIVE_DTYPES, ids=ref.name_of)
by_order = pytest.mark.parametrize("order", ref.NATIVE_ORDERS, ids=lambda order: f"L{order:g}")
by_foreach = pytest.mark.parametrize(
    "foreach", [None, False, True], ids=lambda value: f"foreach={value}"
)
by_layout = pytest.mark.parametrize("layout", ref.LAYOUTS)
by_border_size = pytest.mark.parametrize("size", ref.BORDER_SIZES)
# With a gradient in the list that only torch's operations can take, the others go that way too.
by_way = pytest.mark.parametrize("mixed", [False, True], ids=["native", "general"])
