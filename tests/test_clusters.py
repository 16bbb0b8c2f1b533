"""Clusters of features: those of scikit-learn, in the stream and on whole maps."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loftup import LoftUp, LoftUpError
from loftup.clusters import Clusters

pytest.importorskip("sklearn")


def blobs(counts=(300, 200, 100), channels=12, noise=0.05):
    """Vectors (N, C) around some directions, and which."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(len(counts), channels), dim=1)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return directions[labels] + noise * torch.randn(len(labels), channels), labels


@pytest.mark.parametrize("method", ["kmeans", "gaussian"])
def test_clusters_that_are_apart_are_found_and_numbered_by_size(method):
    vectors, labels = blobs()
    mixed = vectors[torch.randperm(len(vectors))]
    clusters = Clusters.fit(mixed * torch.rand(len(mixed), 1).add(0.1), 3, method=method)  # lengths do not matter
    assert torch.equal(clusters(vectors.T[:, :, None])[:, 0].long(), labels)
    assert len(clusters) == 3


def test_the_nearest_centre_is_scikit_learns():
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    vectors = torch.randn(500, 40)
    clusters = Clusters.fit(vectors, 5, seed=3)
    units = F.normalize(vectors, dim=1).numpy()
    points = PCA(32, random_state=3).fit_transform(units)
    theirs = KMeans(5, n_init=4, random_state=3).fit(points / points.std(0).mean()).labels_
    ours = clusters(vectors.T[:, :, None])[:, 0].numpy()
    # The same partition, in another order.
    table = np.zeros((5, 5), int)
    np.add.at(table, (ours, theirs), 1)
    assert table.max(1).sum() > 450
    assert (np.diff(np.bincount(ours)) <= 0).all()


def test_a_mixture_takes_the_component_of_the_highest_posterior():
    from sklearn.mixture import GaussianMixture

    vectors, _ = blobs(noise=0.4)
    clusters = Clusters.fit(vectors, 3, method="gaussian")
    points = ((F.normalize(vectors, dim=1) - clusters.mean) @ clusters.basis).double()
    mixture = GaussianMixture(3)
    mixture.means_, whitening = clusters.centres.double().numpy(), clusters.whitening.double()
    mixture.precisions_cholesky_ = whitening.numpy()
    weights = (clusters.offsets.double() - whitening.diagonal(dim1=1, dim2=2).log().sum(1)).exp()
    mixture.weights_ = weights.numpy()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    expected = mixture.predict(points.numpy())
    assert (clusters(vectors.T[:, :, None])[:, 0].numpy() == expected).mean() > 0.995


def test_as_a_head_it_labels_as_on_the_map_and_is_kept(tmp_path):
    up = LoftUp.from_pretrained("any")
    features, image = torch.randn(2, 24, 6, 8), torch.rand(2, 3, 48, 64)
    clusters = Clusters.fit([features[0], features[1]], 4)
    labels = up(features, image, head=clusters)
    assert labels.shape == (2, 48, 64)
    assert labels.dtype == torch.uint8
    assert (labels == clusters(up(features, image))).float().mean() > 0.999
    clusters.save(tmp_path / "c.safetensors")
    assert torch.equal(up(features, image, head=Clusters.load(tmp_path / "c.safetensors")), labels)
    again = Clusters.fit([features[0], features[1]], 4)
    assert torch.equal(again.centres, clusters.centres)


def test_fewer_channels_than_components_and_one_cluster():
    assert (Clusters.fit(torch.randn(2, 3, 4, 5), 1)(torch.randn(3, 4, 5)) == 0).all()
    assert len(Clusters.fit(torch.ones(8, 20), 1)) == 1


@pytest.mark.parametrize(
    ("features", "options", "text"),
    [
        (torch.rand(9, 4), {"k": 0}, "k must be a whole number from 1 to 256, got 0"),
        (torch.rand(9, 4), {"k": 257}, "got 257"),
        (torch.rand(9, 4), {"k": 2, "method": "ward"}, "method must be 'kmeans' or 'gaussian', got 'ward'"),
        (torch.rand(9, 4), {"k": 10}, "there are 9 vectors, expected at least k=10"),
        (torch.rand(9, 4) / 0, {"k": 2}, "not finite"),
        ([torch.rand(9, 4), torch.rand(9, 5)], {"k": 2}, r"different channel counts \[4, 5\]"),
        ([], {"k": 2}, "no features given"),
        (torch.rand(9), {"k": 2}, r"features 0 must be maps \(B, C, H, W\).* got \(9,\)"),
    ],
)
def test_refusals(features, options, text):
    with pytest.raises(ValueError, match=text):
        Clusters.fit(features, **options)


def test_other_channels_other_files_and_no_scikit_learn(tmp_path, monkeypatch):
    clusters = Clusters.fit(torch.rand(9, 4), 2)
    with pytest.raises(ValueError, match=r"features must be \(B, 4, H, W\) or \(4, H, W\).* got \(5, 2, 2\)"):
        clusters(torch.rand(5, 2, 2))
    (tmp_path / "x").write_bytes(b"none")
    with pytest.raises(LoftUpError, match="holds no clusters that loftup saved"):
        Clusters.load(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(LoftUpError, match=r'pip install "loftup\[segment\]"'):
        Clusters.fit(torch.rand(9, 4), 2)
