"""The guard's server: from a conversation on the wire to a verdict."""

__version__ = "0.1.0"
