"""The typed config of a run: a section a file, and one loader of YAML.

Imports errors, seeds, storage.
"""

from .analyze import Analyze
from .balancing import Balancing, Clusters
from .data import Data
from .distil import Distil
from .document import dump as dump_document
from .document import dump_commented
from .evaluate import Evaluate, Reference
from .finetune import Finetune, Lora, Projection, Ranges
from .loader import dump_config, load_config, validate
from .merge import Merge
from .mixture import Mixture, Schedule, load_mixture, load_schedule
from .pieces import Pieces
from .pretrain import PartTraining, Pretrain, TextEncoder, Vae
from .protocol import Protocol, load_protocol
from .ray import Ray
from .recipe import Origin, Recipe, parse_recipe
from .run import Config
from .sample import Drawing, Sample, Text
from .search import Search
from .section import Precision, Section
from .stats import Stats
from .study import Study, arm_configs, dump_study, load_study
from .training import Density, Distance, Ema, Training
from .zoo import ScheduleSearch, Zoo, load_zoo

__all__ = [
    "Analyze",
    "Balancing",
    "Clusters",
    "Config",
    "Data",
    "Density",
    "Distance",
    "Distil",
    "Drawing",
    "Ema",
    "Evaluate",
    "Finetune",
    "Lora",
    "Merge",
    "Mixture",
    "Origin",
    "PartTraining",
    "Pieces",
    "Precision",
    "Pretrain",
    "Projection",
    "Protocol",
    "Ranges",
    "Ray",
    "Recipe",
    "Reference",
    "Sample",
    "Schedule",
    "ScheduleSearch",
    "Search",
    "Section",
    "Stats",
    "Study",
    "Text",
    "TextEncoder",
    "Training",
    "Vae",
    "Zoo",
    "arm_configs",
    "dump_commented",
    "dump_config",
    "dump_document",
    "dump_study",
    "load_config",
    "load_mixture",
    "load_protocol",
    "load_schedule",
    "load_study",
    "load_zoo",
    "parse_recipe",
    "validate",
]
