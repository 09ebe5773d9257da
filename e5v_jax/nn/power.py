"""Powers in fp32 with PyTorch's rounding on CPUs, in which the reference makes its frequencies.

PyTorch raises whole vectors by SLEEF's ``powf`` (Shibata and Petrogalli 2020, sleefsimdsp.c), which
is off by one unit in the last place for one number in a hundred. It is followed step by step. What
is left over PyTorch leaves to the C library, which rounds right. A pair (high, low) is a sum.
"""

import numpy as np

_BLOCK = 32
"""Numbers that PyTorch takes at once with AVX-512; with AVX2 16, which differs for few sizes."""
_LOG2 = (np.array(0.69314718246459960938, "f4"), np.array(-1.904654323148236017e-09, "f4"))
_LOG = (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
_TWO_THIRDS = (
    np.array(0.66666662693023681640625, "f4"),
    np.array(3.69183861259614332084311e-09, "f4"),
)
_EXP = (0.00136324646882712841033936, 0.00836596917361021041870117, 0.0416710823774337768554688,
        0.166665524244308471679688, 0.499999850988388061523438)  # fmt: skip
_ONE = np.float32(1)

Pair = tuple[np.ndarray, np.ndarray]


def power(base: float, exponents: np.ndarray) -> np.ndarray:
    """``base ** exponents`` for a base from 1 and exponents fp32 [N] from 0 to 1: fp32 [N]."""
    rounded = np.power(np.float32(base), exponents, dtype=np.float64).astype(np.float32)
    whole = len(exponents) // _BLOCK * _BLOCK
    if whole:
        log = _log(np.full(whole, base, np.float32))
        rounded[:whole] = _exp(_times(log, exponents[:whole]))
    return rounded


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.floating) -> np.ndarray:
    """``a * b + c``, rounded once."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """By Horner's rule, the highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, np.float32(coefficient))
    return y


def _sum(x: np.ndarray, y: np.ndarray | np.floating) -> Pair:
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _add(x: Pair, y: Pair) -> Pair:
    total = x[0] + y[0]
    return total, (((x[0] - total) + y[0]) + x[1]) + y[1]


def _times(x: Pair, y: np.ndarray) -> Pair:
    product = x[0] * y
    return product, _fma(x[1], y, _fma(x[0], y, -product))


def _multiply(x: Pair, y: Pair) -> Pair:
    product = x[0] * y[0]
    return product, _fma(x[0], y[1], _fma(x[1], y[0], _fma(x[0], y[0], -product)))


def _square(x: Pair) -> Pair:
    product = x[0] * x[0]
    return product, _fma(x[0] + x[0], x[1], _fma(x[0], x[0], -product))


def _divide(x: Pair, y: Pair) -> Pair:
    inverse = _ONE / y[0]
    quotient = x[0] * inverse
    error = _fma(-y[1], inverse, _fma(-y[0], inverse, _ONE))
    rest = _fma(x[1], inverse, _fma(inverse, x[0], -quotient))
    return quotient, _fma(quotient, error, rest)


def _log(x: np.ndarray) -> Pair:
    """The natural logarithm, by that of the mantissa from 3/4 to 3/2."""
    exponent = np.frexp(x * np.float32(4 / 3))[1] - 1
    mantissa = np.ldexp(x, -exponent)
    ratio = _divide(_sum(mantissa, -_ONE), _sum(mantissa, _ONE))
    square = _square(ratio)
    series = _add(_times(square, _polynomial(square[0], _LOG)), _TWO_THIRDS)
    found = _add(_times(_LOG2, exponent.astype(np.float32)), (ratio[0] * 2, ratio[1] * 2))
    return _add(found, _multiply(_multiply(square, ratio), series))


def _exp(x: Pair) -> np.ndarray:
    """Two to a whole number, times the power of what is left."""
    whole = np.rint((x[0] + x[1]) * np.float32(1 / np.log(2)))
    for part in (-0.693145751953125, -1.428606765330187045e-06):  # of log 2
        total, low = _sum(x[0], whole * np.float32(part))
        x = total, low + x[1]
    high = x[0] + x[1]
    x = high, (x[0] - high) + x[1]
    power = _add(x, _times(_square(x), _polynomial(x[0], _EXP)))
    total = _ONE + power[0]
    low = ((_ONE - total) + power[0]) + power[1]
    return np.ldexp(total + low, whole.astype(np.int32))
