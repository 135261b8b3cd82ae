"""Which channels of a model live and die together, and what each of them carries."""

from .confirm import confirmed
from .flow import Channels, Layer, Sink, Slot
from .trace import trace_channels

__all__ = ["Channels", "Layer", "Sink", "Slot", "confirmed", "trace_channels"]
