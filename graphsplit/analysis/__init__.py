"""Facts about programs: units, layouts, plans. Nothing here changes a graph."""

from graphsplit.analysis.analysis import Analysis, Lowered, analyse

__all__ = ["Analysis", "Lowered", "analyse"]
