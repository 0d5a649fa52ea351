"""A zoo of networks, held in memory: what a call of each takes, and the distance of images by any schedule of them."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import Zoo
from ..data.prompts import load_prompts
from ..data.sources import open_images
from ..errors import NotFiniteError, UserError
from ..evaluation.extractors import Extractor, load_extractor, weights_of
from ..evaluation.metrics import METRICS, check_is_distance, check_metrics, check_num_images
from ..evaluation.references import Reference, make_reference
from ..evaluation.score import score
from ..executors.devices import default_device, synchronize
from ..merging.keys import has_trunk
from ..models.base import load_base
from ..models.ensemble import TimestepEnsemble
from ..models.identity import model_sha256
from ..models.members import Place, open_member
from ..models.mixture import fill, step_router
from ..models.schedulers import make_scheduler
from ..sampling.checks import check_sample
from ..sampling.model import schedule_settings
from ..sampling.sampler import Denoiser, blank_sampling_network, check_prompts, denoiser, open_prompts, sample_images
from ..storage.hub import pipeline_folder
from .schedules import Slots


class OpenedZoo:
    """The networks of a zoo, checked against the base, with what their images are compared with.

    Attributes:
        names: of the models; that of model k of a schedule is number k - 1.
        sha256: of each model.

    Raises:
        UserError: a model is missing, damaged or doesn't fit the base, the metric is no distance, there are too few
            images for it, or the base's sampler can't leave steps out or takes no such number of them.
    """

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.device, self.names = zoo, default_device(), list(zoo.models)
        self.metric = zoo.schedule.metric
        check_metrics([self.metric], zoo.stats)
        check_is_distance(self.metric, "schedule.metric")
        check_num_images(self.metric, zoo.schedule.num_images, "schedule.num_images")
        check_num_images(self.metric, zoo.schedule.num_report_images, "schedule.num_report_images")
        self.base = load_base(zoo.base)
        place = Place(pipeline_folder(zoo.base), self.base)
        self.settings = schedule_settings(self.base, zoo.sample, zoo.schedule.num_slots)
        make_scheduler(self.base, None, zoo.schedule.num_slots, None, range(zoo.schedule.num_slots))
        for num_steps in (zoo.schedule.num_slots, *zoo.schedule.baseline_steps):
            check_sample(self.base, self.settings, num_steps)
        members = [open_member(name, place) for name in zoo.models.values()]
        texts = load_prompts(zoo.text)
        check_prompts(self.base, bool(texts))
        self.prompts = open_prompts(self.base, texts, zoo.text, self.device)
        others = [None if m.base is self.base else m.base.network.config for m in members]
        self.sha256 = [model_sha256(self.base, [m.weights], (), [o]) for m, o in zip(members, others, strict=True)]
        self.compared = self._compared()
        self.networks = []
        for member in members:
            network = blank_sampling_network(member.base, has_trunk(member.weights), self.settings, self.device)
            fill(network, member)
            self.networks.append(network)

    def _compared(self) -> tuple[Extractor, Reference]:
        name, base = METRICS[self.metric].extractor, self.base
        images = open_images(self.zoo.reference, split=self.zoo.stats.split)
        if tuple(images[0].shape) != (found := (base.channels, base.image_size, base.image_size)):
            raise UserError(
                f"reference {self.zoo.reference}: found images {tuple(images[0].shape)}, expected {found} as the base "
                "draws"
            )
        extractor = load_extractor(name, self.device, weights_of(name, self.zoo.stats))
        return extractor, make_reference(self.zoo.reference, images, extractor, self.zoo.num_reference_images)

    def denoiser(self, slots: Slots) -> Denoiser:
        """Make one denoiser of the models that a schedule runs."""
        used = sorted({k for k in slots if k})
        router = step_router(self.base, [used.index(k) if k else None for k in slots])
        networks = [self.networks[k - 1] for k in used]
        return denoiser(self.base, TimestepEnsemble(networks, router, self.base.timestep_of))

    def distance(self, slots: Slots, seeds: range) -> float:
        """Draw images by a schedule and score them; infinite where they aren't finite."""
        kept = [i for i, k in enumerate(slots) if k]
        return self._score(self.denoiser(slots), seeds, len(slots), kept)

    def distance_alone(self, model: int, num_steps: int, seeds: range) -> float:
        """Score one model by the plain sampler, without a schedule."""
        return self._score(denoiser(self.base, self.networks[model - 1]), seeds, num_steps, None)

    def _score(self, model: Denoiser, seeds: range, num_steps: int, kept: list[int] | None) -> float:
        drawn = sample_images(model, self.base, seeds, self.settings, self.device, num_steps, self.prompts, kept=kept)
        try:
            found = score(drawn, [self.metric], [self.compared])[self.metric]
        except NotFiniteError:
            return math.inf
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def measure(self) -> list[float]:
        """Measure the seconds of a call of each model on a batch: the median of some, after one to warm up.

        Models take turns, so that what else the machine does meets all alike.
        """
        size = self.settings.batch_size
        x = torch.zeros(size, *self.base.shape, device=self.device)
        models = [denoiser(self.base, network) for network in self.networks]
        calls = [m if self.prompts is None else self.prompts.guide(m, range(size)) for m in models]
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(self.zoo.schedule.num_timed + 1):
            for call, found in zip(calls, times, strict=True):
                seconds = _timed(call, x, self.device)
                if turn:
                    found.append(seconds)
        return [statistics.median(found) for found in times]


def _timed(call: Callable[..., object], x: Tensor, device: torch.device) -> float:
    started = time.perf_counter()
    call(x, 1)
    synchronize(device)
    return time.perf_counter() - started
