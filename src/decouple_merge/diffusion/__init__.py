"""Timesteps, noise and losses of diffusion: pure maths of tensors.

Imports errors.
"""
