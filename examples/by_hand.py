"""Forward and backward propagation of the 784-128-64-10 network, layer by layer, equal to autograd.

    forward:   z_l = a_(l−1) W_lᵀ + b_l,  a_l = max(z_l, 0),  ŷ = softmax(z_3),  L = −1/n Σ log ŷ[label]
    backward:  δ_3 = (ŷ − y)/n,  ∂L/∂W_l = δ_lᵀ a_(l−1),  ∂L/∂b_l = Σ δ_l,  δ_(l−1) = (δ_l W_l) ∘ [z_(l−1) > 0]

Run: python examples/by_hand.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.tasks.networks import mlp


def by_hand(weights: list[Tensor], biases: list[Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss and the gradients of weights and biases."""
    activations, sums = [x], []
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        sums.append(activations[-1] @ weight.T + bias)
        activations.append(sums[-1].clamp_min(0) if layer + 1 < len(weights) else sums[-1])
    scores = activations[-1] - activations[-1].max(1, keepdim=True).values
    shares = scores.exp() / scores.exp().sum(1, keepdim=True)
    loss = -shares[torch.arange(len(labels)), labels].log().mean()
    delta = (shares - F.one_hot(labels, shares.shape[1])) / len(labels)
    of_weights, of_biases = [], []
    for layer in reversed(range(len(weights))):
        of_weights.insert(0, delta.T @ activations[layer])
        of_biases.insert(0, delta.sum(0))
        if layer:
            delta = (delta @ weights[layer]) * (sums[layer - 1] > 0)
    return loss, of_weights, of_biases


def main() -> float:
    """The largest difference between a gradient by hand and autograd's."""
    torch.manual_seed(0)
    network = mlp().double()
    x, labels = torch.rand(32, 1, 28, 28, dtype=torch.float64), torch.randint(10, (32,))
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    loss, of_weights, of_biases = by_hand([a.weight.detach() for a in linear], [a.bias.detach() for a in linear], x.flatten(1), labels)
    expected = F.cross_entropy(network(x), labels)
    expected.backward()  # type: ignore[no-untyped-call]
    worst = abs(float(loss) - expected.item())
    for layer, of_weight, of_bias in zip(linear, of_weights, of_biases, strict=True):
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        parts = (of_weight - layer.weight.grad), (of_bias - layer.bias.grad)
        worst = max(worst, *(float(part.abs().max()) for part in parts))
        print(f"{layer.in_features:4} → {layer.out_features:3}: |∂L/∂W| = {of_weight.norm():.4f}, |∂L/∂b| = {of_bias.norm():.4f}")
    print(f"largest difference to autograd: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
