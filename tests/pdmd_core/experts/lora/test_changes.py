"""What parts of modules add to weights, against the definitions of LyCORIS."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pdmd_core.experts.lora.changes import Dense, LowRank, changes_of_module, rank_of, sum_of
from tests.helpers.tiny import randn

SCALE = 0.25


def only(parts: dict[str, Tensor], scale: float = SCALE) -> LowRank | Dense:
    found = changes_of_module(parts, scale, "x")
    assert list(found) == ["weight"] and len(found["weight"]) == 1
    return found["weight"][0]


def test_loha_is_the_product_of_two_products() -> None:
    up1, down1, up2, down2 = randn(40, 2, seed=1), randn(2, 48, seed=2), randn(40, 2, seed=3), randn(2, 48, seed=4)
    parts = {"LoHa w1_a": up1, "LoHa w1_b": down1, "LoHa w2_a": up2, "LoHa w2_b": down2}
    change = only(parts)
    assert isinstance(change, LowRank) and change.down.shape[0] == 4
    torch.testing.assert_close(change.dense(), SCALE * (up1 @ down1) * (up2 @ down2))
    assert rank_of(parts) == 2
    small = {name: value[:4] if name.endswith("_a") else value[:, :4] for name, value in parts.items()}
    assert isinstance(only(small), Dense), "factors would be larger"


@pytest.mark.parametrize("small", [True, False])
def test_lokr_is_a_kronecker_product(small: bool) -> None:
    w1, up, down = randn(2, 2, seed=1), randn(30, 3, seed=2), randn(3, 20, seed=3)
    expected = torch.kron(w1, up @ down)
    factors = {"LoKr w1": w1, "LoKr w2_a": up, "LoKr w2_b": down} if small else {"LoKr w1": w1, "LoKr w2": up @ down}
    change = only(factors)
    assert isinstance(change, LowRank if small else Dense)
    torch.testing.assert_close(change.dense(), (SCALE if small else 1.0) * expected, msg="whole factors have no alpha")
    left, right = randn(2, 1, seed=4), randn(1, 2, seed=5)
    both = {name: value for name, value in factors.items() if name != "LoKr w1"}
    change = only(both | {"LoKr w1_a": left, "LoKr w1_b": right})
    torch.testing.assert_close(change.dense(), SCALE * torch.kron(left @ right, up @ down))


def test_lokr_of_a_convolution() -> None:
    w1, w2 = randn(2, 2, seed=1), randn(3, 4, 3, 3, seed=2)
    expected = torch.kron(w1[..., None, None], w2)
    torch.testing.assert_close(only({"LoKr w1": w1, "LoKr w2": w2}).dense(), expected)


def test_lora_of_a_convolution() -> None:
    down, up = randn(4, 3, 1, 2, 2, seed=1), randn(8, 4, 1, 1, 1, seed=2)
    change = only({"down": down, "up": up})
    assert change.shape == (8, 3, 1, 2, 2)
    torch.testing.assert_close(change.dense(), SCALE * torch.einsum("or,riabc->oiabc", up[:, :, 0, 0, 0], down))


def test_biases_of_a_projection_are_scaled_as_it_is_and_differences_are_not() -> None:
    parts = {"down": randn(2, 3), "up": randn(3, 2), "up bias": torch.ones(3)}
    assert changes_of_module(parts, SCALE, "x")["bias"][0].dense().tolist() == [SCALE] * 3
    assert changes_of_module({"bias difference": torch.ones(3)}, SCALE, "x")["bias"][0].dense().tolist() == [1.0] * 3


def test_float8_is_brought_into_a_dtype_that_multiplies() -> None:
    down, up = randn(4, 8, seed=1).to(torch.float8_e4m3fn), randn(8, 4, seed=2).to(torch.float8_e4m3fn)
    change = only({"down": down, "up": up})
    assert isinstance(change, LowRank)
    factors = change.factors()
    assert [factor.dtype for factor in factors] == [torch.bfloat16] * 2
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(factors, (down, up), strict=True))
    torch.testing.assert_close(change.dense(), SCALE * (up.float() @ down.float()))


def test_a_sum_of_products_is_one() -> None:
    products = [LowRank(randn(2, 5, seed=n), randn(6, 2, seed=n + 9), 0.3 * n + 0.1) for n in range(3)]
    total = sum_of(products)
    assert total.down.shape[0] == 6
    torch.testing.assert_close(total.dense(), sum(product.dense() for product in products))
