"""Every path in a study's folder (the layout is in docs/study.md)."""

from dataclasses import dataclass
from pathlib import Path

from .run_folder import LOCKS, Run


@dataclass(frozen=True)
class StudyFolder:
    """The paths of a study's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def work(self) -> Path:
        # The names of its runs, for whoever looks on.
        return self.folder / "progress" / "runs.json"

    @property
    def figure(self) -> Path:
        return self.folder / "figures" / "study.png"

    def results(self, suffix: str) -> Path:
        return self.folder / f"results.{suffix}"

    def run(self, arm: str, seed: int) -> Run:
        return Run(self.folder / f"{arm}-{seed}")

    def lock(self, name: str) -> Path:
        return self.folder / LOCKS / f"{name}.lock"

    def training(self, key: str) -> Path:
        # What several runs would train alike; theirs are links to it.
        return self.folder / "shared" / key

    def records(self, key: str) -> Path:
        return self.folder / "shared" / f"{key}.jsonl"
