"""Facts about programs: units, layouts, plans. Nothing here changes a graph."""

from graphsplit.analysis.analysis import Analysis, analyse

__all__ = ["Analysis", "analyse"]
