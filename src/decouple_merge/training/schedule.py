"""The learning rate of an update."""

import math

from ..config import Training


def learning_rate_at(update: int, settings: Training) -> float:
    """Compute the learning rate of an update (0-based) from the settings' schedule."""
    if update < settings.num_warmup_updates:
        return settings.learning_rate * (update + 1) / settings.num_warmup_updates
    if settings.schedule == "constant":
        return settings.learning_rate
    decaying = max(1, settings.num_updates * settings.decay_fraction - settings.num_warmup_updates)
    progress = min(1.0, (update - settings.num_warmup_updates) / decaying)
    fall = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * fall)


def learning_rate_factor(update: int, num_updates: int) -> float:
    """Compute the rate of an update (0-based) over its highest: a linear rise over a twentieth, then half a cosine."""
    rise = min(1.0, (update + 1) / max(1, num_updates // 20))
    return rise * (1 + math.cos(math.pi * update / num_updates)) / 2
