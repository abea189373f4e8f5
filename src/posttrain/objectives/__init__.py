"""The stages' losses: pure functions of a model and a micro-batch."""
