"""Linear layers for few rows against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from palate.serving.linear import MOST, FewRowsLinear, favour_few_rows


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 1, 48), (16, 1, 48), (4, 8, 48), (MOST + 1, 48), (5, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_usual_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias))
    favour_few_rows(model)
    layer, x = model[0], torch.randn(shape)
    assert type(layer) is FewRowsLinear
    with torch.no_grad():
        y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_gradients_and_other_types_take_the_usual_path() -> None:
    layer = FewRowsLinear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert layer.to(torch.bfloat16)(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parameters_and_subclasses_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "own": Own(4, 4)})
    before = dict(model.named_parameters())
    favour_few_rows(model)
    assert type(model["own"]) is Own
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
