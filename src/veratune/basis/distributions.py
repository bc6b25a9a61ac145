"""Random 32-bit words to values, bit-equal on every machine.

Only exact or correctly rounded operations are used (shifts, +, -, *, /, sqrt), so no mathematics
library has a say in the result.
"""

import math

import numpy as np
from numpy.typing import NDArray

from veratune.config import Init

Bits = NDArray[np.uint32]
Values = NDArray[np.float32]


def values(bits: Bits, init: Init) -> Values:
    """Unscaled values of a distribution.

    kaiming_uniform: U[-1, 1) in steps of 2**-23. kaiming_normal: N(0, 1). uniform: U[0, 1) in steps
    of 2**-24.
    """
    if init == "kaiming_normal":
        return _normal(bits)
    mantissa = (bits >> np.uint32(8)).astype(np.float32)
    if init == "uniform":
        return mantissa * np.float32(2.0**-24)
    return mantissa * np.float32(2.0**-23) - np.float32(1)


def gain(init: Init, fan_in: int) -> float:
    """Return the gain of a matrix of unscaled values.

    Kaiming uniform: sqrt(6 / fan_in). Kaiming normal: sqrt(2 / fan_in). Uniform on [0, 0.1]: 0.1.
    Source: He, Zhang, Ren, Sun, ICCV 2015, with the gain of a rectifier, as torch.nn.init has it.
    """
    if init == "uniform":
        return 0.1
    return math.sqrt((6.0 if init == "kaiming_uniform" else 2.0) / fan_in)


# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics
# 37 (1988), routine PPND16: rational approximations, coefficients in rising order, numerator then
# denominator.
_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_MIDDLE = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
_LN2 = 0.6931471805599453


def _normal(bits: Bits) -> Values:
    """N(0, 1) by inversion of the distribution function at (bits + 1/2) / 2**32, in float64,
    rounded once.
    """
    p = (bits.astype(np.float64) + 0.5) * 2.0**-32
    q = p - 0.5
    out = np.empty_like(p)
    centre = np.abs(q) <= 0.425
    inner = q[centre]
    out[centre] = inner * _rational(_CENTRE, 0.180625 - inner * inner)
    outer = q[~centre]
    r = np.sqrt(-_log(np.minimum(p[~centre], 1.0 - p[~centre])))
    magnitude = np.where(r <= 5.0, _rational(_MIDDLE, r - 1.6), _rational(_TAIL, r - 5.0))
    out[~centre] = np.where(outer < 0, -magnitude, magnitude)
    return out.astype(np.float32)


def _rational(
    coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    top, bottom = (_horner(c, x) for c in coefficients)
    return top / bottom


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x
        total = total + c
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ln x = e ln 2 + 2 atanh((m - 1) / (m + 1)) for x = m 2**e, by its series (numpy's own log
    varies by machine).
    """
    m, e = np.frexp(x)
    s = (m - 1.0) / (m + 1.0)
    odd = tuple(1.0 / k for k in range(1, 42, 2))
    series = _horner(odd, s * s)
    return e * _LN2 + 2.0 * s * series
