"""A config whose paths are where they were when a run was made, so that it can go on from any folder."""

from pathlib import Path
from typing import Any

from ..config import Clusters, Config, Pretrain, Reference
from ..config.analyze import LossWeights
from ..data.sources import located_source


def located(config: Config) -> Config:
    """Make the paths of a config absolute, counted from the current folder.

    Names on a hub stay names, and what isn't there is refused by its own name later. Links stay links, so that what
    they lead to may be moved.
    """
    return _changed(
        config,
        base=located_name(config.base),
        data=_changed(config.data, source=located_source(config.data.source), path=_absolute(config.data.path)),
        finetune=_located_training(config.finetune),
        distil=config.distil and _located_training(config.distil),
        pretrain=_located_pretrain(config.pretrain),
        analyze=_changed(config.analyze, loss_weights=_located_run(config.analyze.loss_weights)),
        text=_changed(config.text, prompts=_absolute(config.text.prompts)),
        search=_changed(
            config.search,
            checkpoints=[located_name(name) for name in config.search.checkpoints],
        ),
        evaluate=_changed(
            config.evaluate,
            reference=_located_reference(config.evaluate.reference),
            inception_weights=_absolute(config.evaluate.inception_weights),
            judge=located_name(config.evaluate.judge),
            dinov2=located_name(config.evaluate.dinov2),
            clip=located_name(config.evaluate.clip),
        ),
    )


def _located_run(settings: LossWeights) -> LossWeights:
    return _changed(settings, run=_absolute(settings.run))


def _located_pretrain(settings: Pretrain | None) -> Pretrain | None:
    return settings and _located_training(_changed(settings, start=located_name(settings.start)))


def _located_training(settings: Any) -> Any:
    """Make the path of the similarities absolute, wherever clusters of timesteps are asked for."""
    asked = {name: getattr(settings, name, None) for name in ("balancing", "ranges")}
    clusters = {name: c for name, c in asked.items() if isinstance(c, Clusters)}
    return _changed(settings, **{n: _changed(c, similarity=_absolute(c.similarity)) for n, c in clusters.items()})


def _changed(section: Any, **values: Any) -> Any:
    """Change what differs only: a section remembers which of its values were set."""
    return section.model_copy(update={k: v for k, v in values.items() if v != getattr(section, k)})


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path and path.exists() else path


def located_name(name: Any) -> Any:
    """Make a model's path absolute; a name that is no path stays."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _located_reference(reference: Reference | None) -> Reference | None:
    if reference is None or reference.source is None:
        return reference
    return _changed(reference, source=located_source(reference.source))
