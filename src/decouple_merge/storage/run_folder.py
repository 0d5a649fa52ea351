"""Every path in a run folder (the layout is in docs/architecture.md)."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .reading import looked_for

LOCKS = "locks"


def kept_weights(training: Path, update: int) -> Path:
    """Say where a training keeps its averaged weights as they were after an update."""
    return training / "checkpoints" / f"{update}.safetensors"


@dataclass(frozen=True)
class Run:
    """The paths of a run folder (the layout is in docs/architecture.md)."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def costs(self) -> Path:
        return self.folder / "costs.jsonl"

    @property
    def work(self) -> Path:
        return self.folder / "progress" / "work.json"

    @property
    def shares(self) -> Path:
        return self.folder / "shares"

    def progress(self, training: str) -> Path:
        return self.folder / "progress" / f"{training}.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def study(self) -> Path:
        return self.folder / "search" / "study.jsonl"

    @property
    def search(self) -> Path:
        return self.folder / "search" / "search.json"

    @property
    def trials(self) -> Path:
        return self.folder / "search" / "trials.jsonl"

    @property
    def learned(self) -> Path:
        return self.folder / "search" / "learned.json"

    @property
    def candidates(self) -> Path:
        return self.folder / "search" / "candidates.json"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def distilling(self) -> Path:
        return self.folder / "distilling"

    @property
    def distilled(self) -> Path:
        return self.folder / "distilled"

    @property
    def merged_lora(self) -> Path:
        return self.folder / "merged-lora"

    @property
    def sample_figure(self) -> Path:
        return self.folder / "figures" / "samples.png"

    def analysis(self, file: str) -> Path:
        return self.folder / "analysis" / file

    def figure(self, file: str) -> Path:
        return self.folder / "figures" / file

    def search_figure(self, name: str) -> Path:
        return self.folder / "figures" / f"search-{name}.png"

    def lock(self, name: str) -> Path:
        return self.folder / LOCKS / f"{name}.lock"

    def expert(self, index: int) -> Path:
        return self.folder / "experts" / str(index)

    def fisher(self, index: int) -> Path:
        # Not in the expert's folder: a folder with two weights files is no model.
        return self.folder / "fisher" / f"{index}.safetensors"

    def gram(self, index: int) -> Path:
        return self.folder / "gram" / f"{index}.safetensors"

    def baseline(self, name: str) -> Path:
        return self.folder / "baselines" / name

    def samples(self, model: str) -> Path:
        return self.folder / "samples" / model


def kept_checkpoints(training: Path) -> dict[int, Path]:
    """List the averaged weights that a training kept, by their updates, the first one first."""
    found = {int(path.stem): path for path in (training / "checkpoints").glob("*.safetensors") if path.stem.isdigit()}
    return dict(sorted(found.items()))


def check_run(folder: Path) -> None:
    """Require that a folder is a run's.

    Raises:
        UserError: it has no config.
    """
    if not Run(folder).config.is_file():
        raise UserError(
            f"{folder}{looked_for(folder)} has no config.yaml, expected a run folder: give the folder that deme run "
            "wrote"
        )
