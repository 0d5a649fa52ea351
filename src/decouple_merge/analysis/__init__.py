"""Figures of trainings, searches and images.

Imports diffusion, searching, storage.
"""
