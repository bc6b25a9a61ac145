"""Every experiment by its name."""

from veratune.errors import ConfigError, near
from veratune_lab.paper.ablations import Figure2, Figure3, Figure4, Figure5, Table6, Table7
from veratune_lab.paper.cifar import CifarJpeg
from veratune_lab.paper.conv import ConvIntel, ConvMnist
from veratune_lab.paper.counts import Counts, Table1, Table8, Table9, Table10, Table11
from veratune_lab.paper.ddpm import Ddpm, LoraStyles
from veratune_lab.paper.detection import Detection
from veratune_lab.paper.experiment import Experiment
from veratune_lab.paper.fewshot import EfficientNetFewShot, Table5
from veratune_lab.paper.figure6 import Figure6
from veratune_lab.paper.instruct import Table4, Table12, Table13
from veratune_lab.paper.recipes import Recipes
from veratune_lab.paper.table2 import Table2
from veratune_lab.paper.table3 import Table3
from veratune_lab.quality.experiment import Quality

_KINDS: tuple[type[Experiment], ...] = (
    Table1, Counts, Table2, Table3, Table4, Table5, Table6, Table7, Table8, Table9, Table10, Table11, Table12, Table13, Figure2, Figure3, Figure4, Figure5, Figure6, Recipes,
    ConvMnist, ConvIntel, CifarJpeg, EfficientNetFewShot, Detection, Ddpm, LoraStyles, Quality,
)  # fmt: skip
EXPERIMENTS = {kind.name: kind for kind in _KINDS}


def experiment(name: str) -> Experiment:
    """An experiment by its name. Raises ConfigError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ConfigError(
            f"unknown experiment {name!r}; there are {', '.join(EXPERIMENTS)}{near(name, EXPERIMENTS)}"
        )
    return EXPERIMENTS[name]()
