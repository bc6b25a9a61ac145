"""Every experiment by its name."""

from veratune.errors import ConfigError, near
from veratune.reproduce.cifar import CifarJpeg
from veratune.reproduce.conv import ConvIntel, ConvMnist
from veratune.reproduce.ddpm import Ddpm, LoraStyles
from veratune.reproduce.detection import Detection
from veratune.reproduce.experiment import Experiment
from veratune.reproduce.fewshot import EfficientNetFewShot, Table5
from veratune.reproduce.table2 import Table2

EXPERIMENTS: dict[str, type[Experiment]] = {
    kind.name: kind
    for kind in (Table2, Table5, ConvMnist, ConvIntel, CifarJpeg, EfficientNetFewShot, Detection, Ddpm, LoraStyles)
}


def experiment(name: str) -> Experiment:
    """An experiment by its name. Raises ConfigError for an unknown one."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}; there are {', '.join(EXPERIMENTS)}{near(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]()
