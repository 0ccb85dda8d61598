"""rlfr: reinforcement learning with verifiable rewards and flow rewards (RLFR, arXiv 2510.10201)."""

__version__ = "0.1.0"
