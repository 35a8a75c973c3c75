"""The handwritten digits that come with scikit-learn: 1,797 images of 8 × 8, at once and without a file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graphsplit.errors import LoadError

TEST_SHARE = 5  # one in five


def digits(*, train: bool = True, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images and labels; one in five, chosen once for all, is in the test set.

    Args:
        train: The 1,437 images to train on, else the 360 others.
        size: Height and width; other than 8, images are scaled (28 for a network made for MNIST).

    Returns:
        Images ``[N, 1, size, size]`` in 0 to 1, labels ``[N]`` as int64.

    Raises:
        LoadError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LoadError(
            "the digits come with scikit-learn, which is not installed",
            hint="pip install 'graphsplit[data]', or read MNIST's files with gs.data.mnist",
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tested = len(labels) // TEST_SHARE + 1
    chosen = order[tested:] if train else order[:tested]
    images, labels = images[chosen], labels[chosen]
    if size != images.shape[-1]:
        images = functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images, labels
