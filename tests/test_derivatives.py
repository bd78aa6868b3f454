"""histogram_l1's derivatives beyond the first, which test_kernels.py checks."""
import sys

import pytest
import torch
from test_kernels import DEVICE, INTERPRETED, draw
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import histogram_l1
from kernels.histogram_l1 import histogram_l1_reference


@pytest.mark.parametrize("as_operator", [False, True])
def test_derivatives_but_the_first_are_right_or_refused(monkeypatch, as_operator):
    """They were zero or wrong, in silence."""
    module = sys.modules["kernels.histogram_l1"]     # Dynamo must find torch's own as it is
    monkeypatch.setattr(module, "is_compiling", lambda: as_operator)
    logits, codes, mask = (t.to(DEVICE) for t in draw(1, 2, 2, 6, 9, dtype=torch.float64))
    leaf, along = logits.clone().requires_grad_(), torch.randn_like(logits)

    def forward(f):
        return torch.func.jvp(lambda x: f(x, codes, mask), (logits,), (along,))[1]

    def dual_of_a_leaf(f):
        with torch.autograd.forward_ad.dual_level():
            out = f(torch.autograd.forward_ad.make_dual(leaf, along), codes, mask)
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    def second(f, power=1):
        first, = torch.autograd.grad(f(leaf, codes, mask).pow(power).sum(), leaf, create_graph=True)
        return torch.autograd.grad((first * along + leaf).sum(), leaf)[0] - 1

    for derivative in (forward, dual_of_a_leaf, second, lambda f: second(f, 2)):
        expected = derivative(histogram_l1_reference)
        assert expected.abs().max() > 1e-3
        if as_operator or DEVICE != "cpu" or INTERPRETED:
            with pytest.raises(RuntimeError, match="histogram_l1 has no"):
                derivative(histogram_l1)
        else:
            torch.testing.assert_close(derivative(histogram_l1), expected)
    histogram_l1(leaf, codes, mask).sum().backward()             # the first one stays


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="the operator has the first "
                    "derivative only, as the test above says")
def test_derivatives_through_vmap_and_jvp_are_right():
    """Inside, logits.requires_grad says nothing of the levels outside."""
    logits, codes, mask = draw(3, 2, 2, 6, 9, masks=2, dtype=torch.float64)
    leaf, along = logits.clone().requires_grad_(), torch.randn_like(logits)

    def by_photo(f, x):
        return torch.func.vmap(lambda one: f(one[None], codes[:1], mask))(x)

    def through_vmap(f):
        return torch.autograd.grad(by_photo(f, leaf).square().sum(), leaf)[0]

    def grad_of_vmap(f):
        return torch.func.grad(lambda x: by_photo(f, x).square().sum())(logits)

    def grad_of_jvp(f):
        def slope(x):
            return torch.func.jvp(lambda y: f(y, codes, mask), (x,), (along,))[1].square().sum()
        return torch.func.grad(slope)(logits)

    for derivative in (through_vmap, grad_of_vmap, grad_of_jvp):
        expected = derivative(histogram_l1_reference)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(derivative(histogram_l1), expected)


def test_the_callers_logits_are_left_as_they_are():
    logits, codes, mask = (t.to(DEVICE) for t in draw(2, 2, 2, 6, 9))
    before = logits.clone()
    with torch.inference_mode():
        histogram_l1(logits, codes, mask)
    assert torch.equal(logits, before)


def test_the_operators_backward_pass_writes_the_gradient_alone():
    """No zeros for the operator's second output, which nobody differentiates."""
    operator = sys.modules["kernels.histogram_l1"]._histogram_l1
    logits, codes, mask = (t.to(DEVICE) for t in draw(2, 3, 2, 6, 9))
    written = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            if isinstance(out, torch.Tensor) and out.shape == logits.shape:
                written.append(function.overloadpacket.__name__)
            return out

    loss = operator(logits.requires_grad_(), codes, mask, True)[0].sum()
    with Watch():
        loss.backward()
    assert sorted({*written} - {"detach"}) == ["mul"] and logits.grad.any()
