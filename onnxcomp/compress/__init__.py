"""The walk over a model, and the activation quantizers and compensations that it puts in."""
