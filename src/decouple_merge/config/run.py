"""The config of a whole run."""

from pydantic import model_validator

from ..errors import UserError
from ..seeds import check_disjoint
from .analyze import Analyze
from .data import Data
from .distil import Distil
from .evaluate import Evaluate
from .finetune import Finetune
from .numbers import NonNegativeInt
from .paths import Name
from .pieces import Pieces
from .pretrain import Pretrain
from .sample import Sample, Text
from .search import Search


class Config(Pieces):
    """A whole run; its pieces are trainings, candidates, models to score and analyses.

    Attributes:
        seed: of the trainings and of the search's proposals; images have seeds of their own.
        base: a pipeline folder, the name of a base that we ship, or a hub name.
        distil: pull the merged model towards the experts after the search; ``{}`` with the section's own settings, None
            leaves it as it is.
        results: a URL of fsspec, such as ``s3://bucket/run``, to which ``deme run`` copies its folder after each stage.
    """

    seed: NonNegativeInt = 0
    base: Name = "fashion-ddpm"
    data: Data = Data()
    finetune: Finetune = Finetune()
    sample: Sample = Sample()
    text: Text = Text()
    search: Search = Search()
    distil: Distil | None = None
    evaluate: Evaluate = Evaluate()
    analyze: Analyze = Analyze()
    pretrain: Pretrain | None = None
    results: str | None = None

    @property
    def kept_updates(self) -> range:
        """After which updates the baseline's averaged weights are kept."""
        num_updates, every = self.finetune.num_updates * self.finetune.num_experts, self.finetune.keep_every
        return range(0) if every is None else range(every, num_updates + 1, every)

    @property
    def num_combined(self) -> int:
        """How many models the search combines."""
        every = {
            "experts": len(self.search.checkpoints) or self.finetune.num_experts,
            "baseline": 1,
            "baseline-checkpoints": len(self.kept_updates),
            "nothing": 0,
        }
        return every[self.search.over]

    @property
    def search_seeds(self) -> range:
        return range(self.search.first_seed, self.search.first_seed + self.search.num_images)

    @property
    def final_seeds(self) -> range:
        """The finalists' seeds, after all those that chose them."""
        num = self.search.num_final_images or self.evaluate.num_images
        first = self.search.first_seed + max(num, self.search.num_images)
        return range(first, first + num)

    @property
    def all_search_seeds(self) -> range:
        """Every seed that may enter the choice of the model."""
        last = self.final_seeds if self.search.num_finalists else self.search_seeds
        return range(self.search.first_seed, last.stop)

    @property
    def distance_seeds(self) -> range:
        """Seeds of the images that are drawn during training, after all the search's."""
        trainings = [t for t in (self.finetune, self.distil, self.pretrain) if t is not None]
        num = max(t.distance.num_images if t.distance else 0 for t in trainings)
        return range(self.all_search_seeds.stop, self.all_search_seeds.stop + num)

    @property
    def report_sample(self) -> Sample:
        """How the images of the report are drawn."""
        own = {"sampler": self.evaluate.sampler, "num_steps": self.evaluate.num_steps}
        return self.sample.model_copy(update={key: value for key, value in own.items() if value is not None})

    @property
    def report_seeds(self) -> range:
        return range(
            self.evaluate.first_seed,
            self.evaluate.first_seed
            + max(self.evaluate.num_images * self.evaluate.num_seed_sets, self.evaluate.num_sample_images),
        )

    @model_validator(mode="after")
    def _search_over_what_is_trained(self) -> "Config":
        over = self.search.over
        if over.startswith("baseline") and not self.finetune.baseline:
            raise UserError(f"search.over is {over} and finetune.baseline is false: set that to true")
        if over == "baseline-checkpoints" and len(self.kept_updates) < 2:
            raise UserError(
                f"search.over is {over} and finetune.keep_every keeps {len(self.kept_updates)}, expected at least 2: "
                f"set it to a part of the baseline's {self.finetune.num_updates * self.finetune.num_experts} updates"
            )
        return self

    @model_validator(mode="after")
    def _distilled_from_experts(self) -> "Config":
        if self.distil is None:
            return self
        if not self.search.combines_experts:
            raise UserError(
                "distil pulls a merge towards its experts, and the search combines other models: leave it out"
            )
        if self.finetune.projection.placement == "trunk":
            raise UserError(
                "distil is set and finetune.projection.placement is trunk, whose layers no stock network holds: take "
                "folded or none"
            )
        return self

    @model_validator(mode="after")
    def _one_range_to_cluster(self) -> "Config":
        finetune, balancing = self.finetune, self.finetune.balancing
        if balancing and balancing.cuts_batches and self.search.combines_experts and 0 < finetune.global_prob < 1:
            raise UserError(
                f"finetune.balancing is {balancing.method}, which cuts every batch among clusters of timesteps, and "
                f"finetune.global_prob is {finetune.global_prob:g}, which draws some samples elsewhere: set it to 0 or "
                "1, or search.over to what is no experts"
            )
        return self

    @model_validator(mode="after")
    def _seeds(self) -> "Config":
        check_disjoint(range(self.search.first_seed, self.distance_seeds.stop), self.report_seeds)
        return self
