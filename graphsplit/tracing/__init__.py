"""From a user's `nn.Module` to a `Program`. The only place that knows about tracers."""

from graphsplit.tracing.trace import trace

__all__ = ["trace"]
