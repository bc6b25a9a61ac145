"""Sound files as the samples that speech models take."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from veratune.errors import ConfigError

MAX_BYTES = 2**26  # of an encoded recording
_MAX_CHANNELS = 16
_MAX_RATE = 384_000  # samples per second


def read_sound(value: Mapping[str, Any], rate: int, max_seconds: float) -> NDArray[np.float32]:
    """Decode a recording as one channel at a model's sampling rate.

    Args:
        value: {bytes, path} as data sets store it: wav, flac, ogg or mp3.
        rate: The model's samples per second.
        max_seconds: Longest recording; it is checked before anything is decoded.

    Returns:
        The samples, shape (time,). Channels are averaged.

    Raises:
        ConfigError: The package soundfile is not installed.
        ValueError: The file is unreadable, empty, too long, or holds values that are not finite.
    """
    library = _soundfile()
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    try:
        with library.SoundFile(source) as file:
            own_rate, channels, frames = file.samplerate, file.channels, file.frames
            if not 0 < own_rate <= _MAX_RATE or not 0 < channels <= _MAX_CHANNELS:
                raise ValueError(f"{channels} channels at {own_rate:,} samples per second")
            if frames > max_seconds * own_rate:
                raise ValueError(
                    f"{frames / own_rate:,.1f} seconds; at most {max_seconds:g} are read: cut it "
                    "into shorter recordings"
                )
            limit = math.ceil(max_seconds * own_rate)
            samples = file.read(limit, dtype="float32", always_2d=True).mean(axis=1)
    except (library.LibsndfileError, OSError) as error:
        raise ValueError(
            f"not a readable recording ({' '.join(str(error).split())[:120]})"
        ) from None
    if not len(samples):
        raise ValueError("a recording without samples")
    if not np.isfinite(samples).all():
        raise ValueError("a recording with samples that are not finite")
    if own_rate != rate:
        common = math.gcd(own_rate, rate)
        samples = resample_poly(samples, rate // common, own_rate // common)
    return np.asarray(samples, dtype=np.float32)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"reading sound needs the package soundfile ({error}): "
            "pip install 'veratune[multimodal]'"
        ) from None
    return soundfile
