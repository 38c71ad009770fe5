"""The Inception extractor and its numbers beside torch-fidelity's and torchmetrics' own."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from mhla_gen.config import EvaluateConfig, FeaturesConfig, ReferenceConfig
from mhla_gen.evaluation import (
    FeatureStatistics,
    FrechetDistance,
    InceptionExtractor,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    build_reference,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.frechet import FewSamplesWarning
from mhla_gen.evaluation.inception import find_weights, write_random_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::mhla_gen.evaluation.frechet.FewSamplesWarning",
)
COUNT = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    write_random_weights(path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return InceptionExtractor(weights)


def images(seed, size=32, count=COUNT):
    # Smooth random pictures, so that features differ more between images than within noise.
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * (255 if seed == 1 else 80)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return smooth.clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def both(extractor):
    pair = images(1), images(2)
    return pair, tuple(extractor(x) for x in pair)


class Listed(torch.utils.data.Dataset):
    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, item):
        return self.tensor[item]


@pytest.fixture(scope="module")
def fidelity(both, weights):
    (samples, reference), _ = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_fidelity.calculate_metrics(
            input1=Listed(samples),
            input2=Listed(reference),
            isc=True,
            kid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights),
            isc_splits=4,
            samples_shuffle=False,
            kid_subsets=10,
            kid_subset_size=8,
            batch_size=COUNT,
            cuda=False,
            cache=False,
            verbose=False,
        )


def test_features_are_torch_fidelitys(weights, extractor):
    x = images(1, size=48, count=4)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    )
    pool, logits = theirs(x)
    ours = extractor(x)
    assert torch.equal(ours["pool"], pool)
    assert torch.equal(ours["logits"], logits)
    assert {name: f.shape[1] for name, f in ours.items()} == extractor.dims


def test_spatial_features_are_channels_last_of_branch1x1(extractor):
    x = images(2, size=48, count=2)
    caught = []
    branch = extractor.network.Mixed_6d.branch1x1
    handle = branch.register_forward_hook(lambda *hooked: caught.append(hooked[2].clone()))
    spatial = extractor(x)["spatial"]
    handle.remove()
    maps = caught[0]
    assert maps.shape == (2, 192, 17, 17)
    assert (maps >= 0).all()
    expected = torch.stack(
        [maps[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], dim=1
    )
    assert spatial.shape == (2, 2023)
    assert torch.equal(spatial, expected)


def test_numbers_equal_torch_fidelitys(both, fidelity):
    _, (samples, reference) = both
    kid = kernel_distance(samples["pool"], reference["pool"], 10, 8)
    theirs = kid_features_to_metric(
        samples["pool"].double(),
        reference["pool"].double(),
        kid_subsets=10,
        kid_subset_size=8,
        verbose=False,
    )
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert kid.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    # Its command keeps the kernel in float32, which costs it the seventh digit.
    assert kid.mean == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-5)
    mean, std = inception_score(samples["logits"], split_size=COUNT // 4)
    assert mean == pytest.approx(fidelity["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(fidelity["inception_score_std"], rel=1e-4)


def test_precision_recall_equal_torch_fidelitys(both, fidelity):
    _, (samples, reference) = both
    metric = PrecisionRecall()
    metric.update(samples["pool"])
    metric.update(reference["pool"], real=True)
    precision, recall = metric.compute()
    assert precision.item() == pytest.approx(fidelity["precision"], abs=1e-6)
    assert recall.item() == pytest.approx(fidelity["recall"], abs=1e-6)


class Given(torch.nn.Module):
    """Takes features for images: extraction is compared in tests of its own."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x.double()


def test_distance_equals_torch_fidelitys_and_torchmetrics(both):
    # Fewer dimensions than images: the peers' eigenvalues of a singular product are noisy.
    first = [side["pool"][:, : COUNT // 2].double() for side in both[1]]
    ours = frechet_distance(*map(FeatureStatistics.from_features, first))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, first), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    metric = FrechetInceptionDistance(feature=Given(COUNT // 2), normalize=False)
    for features, real in zip(first, (False, True), strict=True):
        metric.update(features, real=real)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_batches_do_not_matter(both, extractor):
    images, features = both
    metric = FrechetDistance(extractor)
    for x, side, real in zip(images, features, (False, True), strict=True):
        found = []
        hook = extractor.register_forward_hook(lambda *call, to=found: to.append(call[-1]["pool"]))
        for batch in x[:7].split(3):
            metric.update(batch, real=real)
        hook.remove()
        found, whole = torch.cat(found), side["pool"][:7]
        # The network rounds to float32, by how much depends on the processor and the batch.
        assert (found - whole).norm() < 1e-5 * whole.norm()
        # The sums are float64. What they subtract is as large as the features are.
        expected, statistics = FeatureStatistics.from_features(found), metric.statistics(real=real)
        size = found.double().square().sum(dim=1).mean().item()
        assert statistics.count == 7
        assert np.abs(statistics.mean - expected.mean).max() < 1e-15 * size**0.5
        assert np.abs(statistics.covariance - expected.covariance).max() < 1e-15 * size


def test_metrics_take_images(both, extractor):
    (samples, reference), features = both
    score, kid = InceptionScore(extractor), KernelDistance(extractor, subsets=3, subset_size=6)
    score.update(samples[:6])
    kid.update(samples[:6])
    kid.update(reference[:6], real=True)
    expected = kernel_distance(features[0]["pool"][:6], features[1]["pool"][:6], 3, 6)
    assert score.compute()[0].item() == pytest.approx(
        inception_score(features[0]["logits"][:6])[0], rel=1e-5
    )
    assert kid.compute()[0].item() == pytest.approx(expected.mean, rel=1e-4)


def test_training_precision_and_autocast_do_not_reach_the_extractor(extractor):
    x = images(3, count=2)
    expected = extractor(x)["pool"]
    extractor.train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = extractor(x)["pool"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


def test_folded_convolutions_are_the_blocks_they_replace(extractor):
    block = extractor.network.Mixed_6d.branch7x7_2
    x = torch.rand(2, block.conv.in_channels, 17, 17)
    folded = torch.nn.functional.conv2d(x, block.weight, block.bias, padding=block.conv.padding)
    # Some 1000 float32 products are summed in another order, for numbers up to 3: about
    # 3 * 1000**0.5 * 1e-7, three times.
    torch.testing.assert_close(folded.relu(), block(x), rtol=3e-5, atol=3e-5)


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_a_cpu(weights, extractor):
    x = images(1, size=64, count=8)
    on_gpu = InceptionExtractor(weights).to("cuda")(x.to("cuda"))
    for name, expected in extractor(x).items():
        error = (on_gpu[name].cpu() - expected).norm() / expected.norm()
        # TF32 would be at 3e-4.
        assert error < 3e-6


def distance_of_few(first, second):
    """The Fréchet distance without a matrix of dimensions by dimensions.

    With centred features A and B as rows, the trace of the root of their covariances' product is
    the sum of the singular values of A Bᵀ.
    """
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (first, second))
    means = (first.mean(0) - second.mean(0)).square().sum()
    traces = a.square().sum() + b.square().sum()
    return (means + traces - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def test_the_command_measures_all_six_against_a_built_reference(tmp_path, both, weights):
    (samples, reference), features = both
    for name, x in (("samples", samples), ("real", reference)):
        np.savez(tmp_path / f"{name}.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    settings = FeaturesConfig(weights=str(weights), cache_dir=str(tmp_path / "cache"))
    built = build_reference(
        ReferenceConfig(
            data=str(tmp_path / "real.npz"), out=str(tmp_path / "ref.npz"), features=settings
        )
    )
    with np.load(built) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file)
        assert file["mu_s"].shape == (2023,)
    config = EvaluateConfig(
        samples=str(tmp_path / "samples.npz"),
        reference=str(built),
        features=settings,
        kid_subset_size=8,
        jackknife_groups=2,
        out=str(tmp_path / "metrics.json"),
    )
    found = {result.metric: result for result in evaluate(config)}
    assert list(found) == ["fid", "sfid", "is", "precision", "recall", "kid"]
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        expected = distance_of_few(*(side[name].double() for side in features))
        assert found[metric].value == pytest.approx(expected, rel=1e-6)
        assert "use more samples" in found[metric].note
        assert found[metric].interval.low < found[metric].value
    assert found["is"].value == pytest.approx(inception_score(features[0]["logits"])[0], rel=1e-6)
    assert found["is"].protocol.endswith("tf1-resize fp32 32x32 splits-of-5000-in-order")
    # A reference that no metric needs is not measured.
    alone = replace(config, metrics=("is",), reference=str(tmp_path / "real.npz"))
    assert [result.value for result in evaluate(alone)] == [found["is"].value]


def test_identity_names_the_weights(extractor):
    assert extractor.identity.name.startswith("inception-")
    assert extractor.identity.name != "inception-2015-12-05"
    assert extractor.identity.resize == "tf1-resize"


def test_missing_damaged_and_foreign_weights_are_one_sentence(tmp_path):
    with pytest.raises(EvaluationError, match=r"nothing\.pth does not exist"):
        InceptionExtractor(tmp_path / "nothing.pth")
    for content in (b"PK\x03\x04 cut short", b"a red square\n", b"101", b""):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(EvaluationError, match="damaged or not a plain state dict"):
            InceptionExtractor(tmp_path / "cut.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match="another network"):
        InceptionExtractor(tmp_path / "other.pth")


def test_weights_that_run_code_are_refused(tmp_path):
    # A pickled function is not a tensor; reading one could run anything.
    torch.save({"fc.weight": np.savez}, tmp_path / "code.pth")
    with pytest.raises(EvaluationError, match="not a plain state dict"):
        InceptionExtractor(tmp_path / "code.pth")


def test_offline_and_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    # A proxy that refuses every connection is a machine without a network.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EvaluationError, match=r"pass features\.weights=PATH") as caught:
        find_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fid_equals_the_peers_at_2048_dimensions():
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -3, 2048)
    sides = [
        torch.randn(2300, 2048, generator=generator).mul(scale).relu().mul(decay).double()
        for scale in (1.0, 1.3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewSamplesWarning)
        ours = frechet_distance(*map(FeatureStatistics.from_features, sides))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, sides), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    metric = FrechetInceptionDistance(feature=Given(2048), normalize=False)
    for features, real in zip(sides, (False, True), strict=True):
        metric.update(features, real=real)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize("dim, count", [(16, 200), (192, 2000)])
def test_formulas_equal_torch_fidelitys_on_random_features(dim, count):
    generator = torch.Generator().manual_seed(dim)
    a = torch.randn(count, dim, generator=generator).relu()
    b = torch.randn(count, dim, generator=generator).mul(1.1).relu()
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    ours = frechet_distance(*map(FeatureStatistics.from_features, (a, b)))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(a, b, kid_subsets=5, kid_subset_size=100, verbose=False)
    ours = kernel_distance(a.float(), b.float(), 5, 100)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    theirs = isc_features_to_metric(a, splits=4, shuffle=False)
    assert inception_score(a, count // 4)[0] == pytest.approx(
        theirs["inception_score_mean"], rel=1e-9
    )
