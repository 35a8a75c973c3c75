"""Rules of fusion: how an op of one model is done for K models at once. Importing this registers them."""

from graphsplit.fusion.rules import along, images, pointwise, products, shapes

__all__ = ["along", "images", "pointwise", "products", "shapes"]
