"""Every experiment by its name."""

from veratune.errors import ConfigError, near
from veratune.reproduce.ablations import Figure2, Figure3, Figure4, Figure5, Table6, Table7
from veratune.reproduce.cifar import CifarJpeg
from veratune.reproduce.conv import ConvIntel, ConvMnist
from veratune.reproduce.counts import Counts, Table1, Table8, Table9, Table10, Table11
from veratune.reproduce.ddpm import Ddpm, LoraStyles
from veratune.reproduce.detection import Detection
from veratune.reproduce.experiment import Experiment
from veratune.reproduce.fewshot import EfficientNetFewShot, Table5
from veratune.reproduce.figure6 import Figure6
from veratune.reproduce.instruct import Table4, Table12, Table13
from veratune.reproduce.recipes import Recipes
from veratune.reproduce.table2 import Table2
from veratune.reproduce.table3 import Table3

_KINDS: tuple[type[Experiment], ...] = (
    Table1, Counts, Table2, Table3, Table4, Table5, Table6, Table7, Table8, Table9, Table10, Table11, Table12, Table13, Figure2, Figure3, Figure4, Figure5, Figure6, Recipes,
    ConvMnist, ConvIntel, CifarJpeg, EfficientNetFewShot, Detection, Ddpm, LoraStyles,
)  # fmt: skip
EXPERIMENTS = {kind.name: kind for kind in _KINDS}


def experiment(name: str) -> Experiment:
    """An experiment by its name. Raises ConfigError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}; there are {', '.join(EXPERIMENTS)}{near(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]()
