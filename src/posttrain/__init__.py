"""posttrain: adapt a base language model to a domain, stage by stage, and serve it with the template it was trained with."""

__version__ = "0.1.0"
