"""The sharechain: what nodes of a peer-to-peer pool agree on, as a pure library."""

__version__ = "0.1.0"
