"""Weights that share few values: the k-means, the step, and how they are stored."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import testing
from hasten.compress import FoldBatchNorm, PackCodebooks, PruneWeights, ShareWeights
from hasten.compress.share import kmeans
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Recipe
from hasten.core.runner import Runner
from hasten.engines import OnnxRuntime, OpenVINO
from hasten.load.lower import forward, lower
from networks import lowered, network


def dense(features: int = 32) -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, features), nn.ReLU(), nn.Linear(features, 3)).eval()
    return Network(kind="module", body=module, example=(torch.randn(4, 12).numpy(),))


def context(of: Network, rows: int = 256) -> Context:
    x = np.random.default_rng(0).standard_normal((rows, *of.example[0].shape[1:])).astype(np.float32)
    return Context(train=View(inputs=(x,), labels=x.reshape(rows, -1)[:, :3].argmax(1)), calibrate=View(inputs=(x[:20],)))


def shared(step: ShareWeights, of: Network) -> nn.Module:
    return step.apply(of, context(of)).module


def values(weight: Tensor) -> int:
    return len(weight.detach().unique())


def naive_lloyd(points: np.ndarray, centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Assign each to the nearest, take the weighted means, until nothing changes."""
    centroids = centroids.copy()
    while True:
        own = np.array([int(np.argmin(np.abs(centroids - p))) for p in points])
        new = centroids.copy()
        for k in range(len(centroids)):
            if (own == k).any():
                new[k] = np.average(points[own == k], weights=sizes[own == k])
        if np.allclose(new, centroids, rtol=0, atol=1e-14):
            return new
        centroids = new


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [2, 7, 16])
def test_lloyd_is_lloyd(k: int, weighted: bool) -> None:
    random = np.random.default_rng(k)
    points = random.standard_normal(400)
    sizes = random.uniform(0.1, 5, 400) if weighted else np.ones(400)
    start = kmeans.linear(torch.from_numpy(points), k)
    found = kmeans.lloyd(torch.from_numpy(points), start, torch.from_numpy(sizes) if weighted else None)
    np.testing.assert_allclose(start.numpy(), np.linspace(points.min(), points.max(), k))
    np.testing.assert_allclose(found.numpy(), naive_lloyd(points, start.numpy(), sizes), atol=1e-12)
    own = kmeans.nearest(torch.from_numpy(points), found).numpy()
    assert np.array_equal(own, np.abs(points[:, None] - found.numpy()).argmin(1))


def test_lloyd_against_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points = np.random.default_rng(0).uniform(-1, 1, 2000)  # uniform: no cluster runs empty, where theirs moves it
    start = np.linspace(points.min(), points.max(), 16)
    theirs = cluster.KMeans(16, init=start[:, None], n_init=1, max_iter=300, tol=0).fit(points[:, None])
    found = kmeans.lloyd(torch.from_numpy(points), kmeans.linear(torch.from_numpy(points), 16))
    np.testing.assert_allclose(found.numpy(), np.sort(theirs.cluster_centers_.ravel()), atol=1e-9)


def test_a_centroid_without_values_stays() -> None:
    found = kmeans.lloyd(torch.tensor([0.0, 0.1, 10.0]), torch.tensor([0.0, 5.0, 10.0]))
    assert found.tolist() == pytest.approx([0.05, 5.0, 10.0])


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_weights_become_their_nearest_centroid(bits: int) -> None:
    of = dense()
    made = shared(ShareWeights(bits=bits), of)
    before, after = of.module[0].weight.detach(), made[0].weight.detach()
    assert values(after) == 2**bits
    book = after.unique()
    nearest = (before[..., None] - book).abs().argmin(-1)
    assert torch.equal(after, book[nearest])
    np.testing.assert_allclose([before[after == c].mean() for c in book], book, rtol=1e-5)
    assert torch.equal(made[0].bias, of.module[0].bias)


def test_groups_have_codebooks_of_their_own() -> None:
    of = dense()
    made = shared(ShareWeights(bits=3, per="group", groups=4), of)
    for part, whole in zip(made[0].weight.split(8), of.module[0].weight.split(8), strict=True):
        assert values(part) == 8
        start = kmeans.linear(whole.flatten(), 8)
        torch.testing.assert_close(part.unique(), kmeans.lloyd(whole.flatten(), start).float())
    assert values(made[0].weight) == 32
    assert values(made[2].weight) == 8, "3 outputs do not divide into 4 groups"


def test_zeros_stay_and_take_one_centroid() -> None:
    of = dense()
    sparse = PruneWeights(amount=0.8).apply(of, context(of))
    for epochs in (0, 2):
        made = shared(ShareWeights(bits=4, epochs=epochs), sparse)
        assert torch.equal(made[0].weight == 0, sparse.module[0].weight == 0)
        assert values(made[0].weight) == 16, "no centroid is wasted on the hole around 0"


def test_fisher_is_the_formula() -> None:
    of = dense()
    told = context(of)
    module, x, y = copy.deepcopy(of.module), torch.from_numpy(told.train.inputs[0]), torch.from_numpy(told.train.labels)
    sizes = torch.zeros_like(module[0].weight)
    for part in range(4):
        module.zero_grad()
        F.cross_entropy(module(x[64 * part :][:64]), y[64 * part :][:64]).backward()
        sizes += module[0].weight.grad.square()
    weight = of.module[0].weight.detach().flatten()
    expected = kmeans.lloyd(weight, kmeans.linear(weight, 16), (sizes + sizes.mean()).flatten())
    made = ShareWeights(importance="fisher").apply(of, told).module
    torch.testing.assert_close(made[0].weight.detach().unique(), expected.float().unique())
    with pytest.raises(Unsupported, match="gradients need labels"):
        ShareWeights(importance="fisher").apply(of, Context(train=told.train, calibrate=told.train, original=of, loss="original"))


@pytest.mark.parametrize("name", ["cnn", "lstm", "encoder", "shared"])
def test_centroids_learn_and_weights_stay_shared(name: str) -> None:
    of = network(name)
    view = View(inputs=tuple(a.repeat(8, 0) for a in of.example))
    told = Context(train=view, calibrate=view, original=of, loss="original")
    cold, warm = (ShareWeights(bits=2, epochs=e).apply(of, told) for e in (0, 30))
    for (path, p), (_, q) in zip(cold.module.named_parameters(), warm.module.named_parameters(), strict=True):
        if "weight" in path and p.ndim > 1 and p.numel() > 4:
            assert values(q) <= 4, path
            ties = [torch.equal(p.detach() == c, q.detach() == q.detach()[p.detach() == c][0]) for c in p.detach().unique()]
            assert all(ties), "the indices stay, the centroids move"
    assert {type(m) for m in warm.module.modules()} == {type(m) for m in of.module.modules()}
    assert not any(m._forward_pre_hooks for m in warm.module.modules())

    def away(made: Network) -> float:
        pairs = zip(forward(of, of.example), forward(made, of.example), strict=True)
        return max(float(np.square(a - b).mean()) for a, b in pairs)

    # Where the running statistics of a norm are random, training moves them and the original is no goal.
    assert name == "cnn" or away(warm) < 0.7 * away(cold)


def test_the_gradient_of_a_centroid_is_the_sum() -> None:
    """One step of gradient descent on the codebook, against the sum of the gradients of its weights."""
    from hasten.compress.share.weights import _Codebook

    index = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(0))
    book = _Codebook(torch.tensor([0.3, -1.0, 0.0, 2.0]), index)
    centroids = book.start.clone().requires_grad_()
    grad = torch.randn(6, 5)
    book(centroids).backward(grad)
    expected = torch.stack([grad[index == k].sum() for k in range(4)])
    expected[2] = 0  # zeros stay zero
    torch.testing.assert_close(centroids.grad, expected)


def test_tied_weights_are_not_trained_apart() -> None:
    of = dense()
    both = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), of.module[0]).eval()
    both[2].weight = both[0].weight
    tied = Network(kind="module", body=both, example=of.example)
    made = shared(ShareWeights(bits=2), tied)
    assert made[0].weight is made[2].weight
    with pytest.raises(Unsupported, match=r"centroids of '0.weight', which two layers hold"):
        shared(ShareWeights(bits=2, epochs=1), tied)


def optimized(graph: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that are left when ONNX Runtime has loaded the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return sorted(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("how", [{"bits": 2}, {"bits": 4}, {"bits": 6}, {"bits": 4, "per": "group", "groups": 2}, {"bits": 8}])
def test_packing_is_exact_and_gone_after_loading(how: dict, tmp_path: Path) -> None:
    of = dense(features=170)
    wide = of.with_body(nn.Sequential(of.module[0], nn.ReLU(), nn.Linear(170, 34), nn.Linear(34, 3)).eval())
    graph = lower(ShareWeights(**how).apply(wide, context(of)))
    made = PackCodebooks().apply(graph, context(of))
    assert any(n.op_type == "Gather" for n in made.graph.graph.node)
    assert all(np.array_equal(a, b) for a, b in zip(forward(graph, of.example), forward(made, of.example), strict=True))
    assert optimized(made.graph, tmp_path) == optimized(graph.graph, tmp_path), "the same operators run"
    share = {2: 1 / 16, 4: 1 / 8, 6: 1 / 4, 8: 1 / 4}[how["bits"]]
    weights = [numpy_helper.to_array(t).nbytes for t in graph.graph.graph.initializer if len(t.dims) > 1]
    assert made.graph.ByteSize() < share * sum(weights) + 3 * 1024 * how.get("groups", 1) + 4000


@pytest.mark.parametrize("name", ["cnn", "lstm", "encoder"])
def test_whole_networks_pack_and_run_in_both_engines(name: str, tmp_path: Path) -> None:
    of = network(name)
    view = View(inputs=of.example)
    told = Context(train=view, calibrate=view, original=of, loss="original")
    folded = FoldBatchNorm().apply(of, told) if name == "cnn" else of
    graph = lower(ShareWeights(bits=3).apply(folded, told))
    made = PackCodebooks().apply(graph, told)
    assert made.graph.ByteSize() < 0.9 * graph.graph.ByteSize()
    assert optimized(made.graph, tmp_path) == optimized(graph.graph, tmp_path)
    for engine in (OnnxRuntime(packed=True), OpenVINO(packed=True)):
        testing.packs_what_runs_alone(engine, made)


def test_openvino_keeps_codebooks_in_its_packed_file_and_computes_them_once(tmp_path: Path) -> None:
    import openvino

    of = dense(features=400)
    graph = lower(ShareWeights(bits=4).apply(of, context(of)))
    made = PackCodebooks().apply(graph, context(of))
    sizes = {}
    for name, network_ in (("plain", graph), ("codebooks", made)):
        (tmp_path / name).mkdir()
        OpenVINO(packed=True).pack(network_, tmp_path / name)
        sizes[name] = (tmp_path / name / "model.bin.xz").stat().st_size
        with Runner(tmp_path / name) as runner:
            np.testing.assert_allclose(runner(*of.example)[0], forward(graph, of.example)[0], atol=1e-5)
    assert sizes["codebooks"] < sizes["plain"]
    onnx.save(made.graph, tmp_path / "made.onnx")
    compiled = openvino.Core().compile_model(openvino.Core().read_model(tmp_path / "made.onnx"), "CPU")
    assert not [n for n in compiled.get_runtime_model().get_ordered_ops() if "Gather" in str(n.get_rt_info()["layerType"])]


def test_packing_finds_channels_that_were_scaled_afterwards() -> None:
    """A batch norm that folds after the sharing leaves each channel with its own few values."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 8, 5), nn.Flatten(), nn.Linear(32, 3)).eval()
    of = Network(kind="module", body=module, example=(torch.randn(3, 16, 6, 6).numpy(),))
    made = ShareWeights(bits=4).apply(of, context(of)).module
    with torch.no_grad():
        made[0].weight.mul_(torch.rand(8, 1, 1, 1))
    graph = lower(of.with_body(made))
    packed = PackCodebooks().apply(graph, context(of))
    assert packed.graph.ByteSize() < 0.5 * graph.graph.ByteSize()
    assert np.array_equal(forward(graph, of.example)[0], forward(packed, of.example)[0])


def test_what_packing_leaves_alone() -> None:
    graph = lowered("cnn")
    with pytest.raises(Unsupported, match="needs weights that take at most 256 values, found none"):
        PackCodebooks().apply(graph, context(network("cnn")))
    old = copy.deepcopy(graph.graph)
    old.opset_import[0].version = 11
    with pytest.raises(Unsupported, match="opset >= 13 without functions, got opset 11"):
        PackCodebooks().apply(graph.with_body(old), context(network("cnn")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, r"bits must be in \[2, 8\], got 1"),
        ({"per": "channel"}, "per must be one of layer, group"),
        ({"importance": "luck"}, "importance must be one of equal, fisher"),
        ({"groups": 2}, "groups must be at least 1, and 1 with per='layer', got 2"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
        ({"epochs": -1}, "epochs must be a finite number of at least 0"),
    ],
)
def test_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShareWeights(**settings)


class Rows(nn.Module):
    """A linear layer of somebody's own, its weight (in, out)."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("epochs", [0.0, 1.0])
def test_layers_of_the_users_own_share_as_well(epochs: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Rows(12, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    of = Network(kind="module", body=module, example=(torch.randn(4, 12).numpy(),))
    made = shared(ShareWeights(bits=3, epochs=epochs), of)
    assert [values(p) for p in made.parameters() if p.ndim > 1] == [8, 8]


def test_refusals() -> None:
    of = dense()
    with pytest.raises(Unsupported, match="needs a layer with more than 256 weights, found none"):
        shared(ShareWeights(bits=8, only=("2",)), of)
    with pytest.raises(Unsupported, match="more than 4 weights"):
        ShareWeights.space(of.with_body(nn.Sequential(nn.BatchNorm1d(3))))
    broken = copy.deepcopy(of.module)
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(Unsupported, match=r"finite weights, '2.weight' has others"):
        shared(ShareWeights(bits=2), of.with_body(broken))


def test_the_recipe_of_deep_compression() -> None:
    recipe = Recipe((PruneWeights(amount=0.8), ShareWeights(), PackCodebooks()), OnnxRuntime(packed=True))
    assert Recipe.from_json(recipe.to_json()) == recipe
    made, told = dense(400), context(dense(400))
    for step in recipe.steps:
        made = step.apply(lower(made) if step.takes == "graph" else made, told)
    weight = made.graph.ByteSize() / (400 * 15 * 4)
    assert weight < 0.3
