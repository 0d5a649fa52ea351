"""Times as they are said."""


def duration(seconds: float) -> str:
    """Say a time in the unit that fits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
