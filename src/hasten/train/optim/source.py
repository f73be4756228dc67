"""From a rule to C++: one loop that loads every array once, computes, and stores every array once.

Buffers may be stored small. bfloat16 is widened exactly and stored with stochastic rounding: with rounding to the nearest, an average
with β = 0.999 changes by less than half a step of bfloat16 and would stand still. 8 bits: a scale for every 256 elements; "signed" holds
q·s/127, "square" (of what is never negative) (q·s/255)², q ≥ 1 where the value is above 0, so that no step is divided by a lost
average. Both are rounded stochastically; the noise is
a function of (element, step), the same in `plain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.train.optim.expression import Rule, traced

BLOCK = 256
_TYPES = {"float32": "float", "float64": "double", "bfloat16": "uint16_t", "signed": "int8_t", "square": "uint8_t"}
_SMALL = ("signed", "square")
LEVELS = {"signed": 127, "square": 255}
LEAST_SCALE = 1e-35  # a block of smaller numbers is all 0: the division by its scale would not be finite


@dataclass(frozen=True)
class Form:
    """What a kernel is made for; everything else is given when it runs.

    Args:
        arrays: (name, storage) in the order of the pointers; "p" and "g" first; a "signed" or "square" array has its scales behind it.
        numbers: names of what is given as doubles.
        flags: (name, value) of what the rule branches on, and "maximize".
    """

    rule: Rule
    arrays: tuple[tuple[str, str], ...]
    numbers: tuple[str, ...]
    flags: tuple[tuple[str, bool], ...]


_HEAD = """#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef %s real;
static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline double magnitude(double x) { return __builtin_fabs(x); }
static inline float down(float x) { return __builtin_floorf(x); }
static inline double down(double x) { return __builtin_floor(x); }
static inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
static inline real sign(real x) { return real(x > 0) - real(x < 0); }
static inline real larger(real a, real b) { return a > b || a != a ? a : b; }
static inline uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline float wide(uint16_t x) { return of_bits(uint32_t(x) << 16); }
static inline uint32_t highest(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline uint16_t narrow(float x, uint32_t more) { return (x != x ? 0x7FC00000u : bits(x) + more) >> 16; }
static inline uint16_t nearest(float x) { return narrow(x, 0x7FFFu + ((bits(x) >> 16) & 1u)); }
"""

_RUN = """
extern "C" void run(int64_t tensors, const int64_t* sizes, void* const* arrays, const double* h, uint32_t seed, double* sums, int threads) {
  int64_t elements = 0;
  for (int64_t t = 0; t < tensors; ++t) elements += sizes[t];
  int64_t* first = (int64_t*)malloc((tensors + 1) * sizeof(int64_t));
  first[0] = 0;
  for (int64_t t = 0; t < tensors; ++t) first[t + 1] = first[t] + (sizes[t] + %(chunk)d - 1) / %(chunk)d;
  const int64_t chunks = first[tensors];
  double* parts = (double*)malloc((chunks * %(sums)d + 1) * sizeof(double));
  #pragma omp parallel for schedule(dynamic) num_threads(threads) if (elements > %(chunk)d * 2)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t t = 0, end = tensors;
    while (end - t > 1) { const int64_t half = (t + end) / 2; if (first[half] <= c) t = half; else end = half; }
    const int64_t start = (c - first[t]) * %(chunk)d;
    span(start, less(%(chunk)d, sizes[t] - start), arrays + t * %(pointers)d, h + t * %(numbers)d, seed, parts + c * %(sums)d);
  }
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < %(sums)d; ++s) sums[s] += parts[c * %(sums)d + s];
  free(parts);
  free(first);
}
"""
CHUNK = 16384
ODD = (0x9E3779B9, 0xB5297A4D, 0x68E31DA5, 0x1B56C4E9)


def _noise(order: int) -> str:
    """16 bits: multiples of an odd number, spread evenly over neighbours, moved as a whole by the random seed of the step."""
    return f"((begin_{order} + uint32_t(k) * {ODD[order % 4]}u) >> 16)"


def written(form: Form) -> str:
    """The C++ source of a kernel; `run` is its only symbol."""
    names = [name for name, _ in form.arrays]
    trace, ends = traced(form.rule, names, form.numbers, {n: v for n, v in form.flags if n != "maximize"})
    small = [(name, storage) for name, storage in form.arrays if storage in _SMALL]
    real = "double" if form.arrays[0][1] == "float64" else "float"
    sums = [end for name, end in ends.items() if name.startswith("sum ")]
    block = BLOCK if small else CHUNK
    lines = [
        _HEAD % real,
        "static void span(int64_t start, int64_t count, void* const* a, const double* h, uint32_t seed, double* sums) {",
        *_pointers(form),
        *(f"const double {name} = h[{k}];" for k, name in enumerate(form.numbers)),
        *trace.numbers,
        *(f"double s{k} = 0;" for k in range(len(sums))),
        f"for (int64_t j = 0; j < count; j += {block}) {{",
        f"const int32_t m = less({block}, count - j);",  # of 32 bits, as the elements: nothing is widened inside the loop
        *(f"const uint32_t begin_{order} = uint32_t(start + j) * {ODD[order % 4]}u + seed;" for order in range(len(names))),
        *(f"uint32_t peak_{name} = 0;" for name, _ in small),
        *(f"real w_{name}[{BLOCK}]; const real step_{name} = S_{name}[j / {BLOCK}] / {LEVELS[s]};" for name, s in small),
        "#pragma omp simd" + _reduced("+", [f"s{k}" for k in range(len(sums))]) + _reduced("max", [f"peak_{name}" for name, _ in small]),
        "for (int32_t k = 0; k < m; ++k) { const int64_t i = j + k;",
        *(_load(name, storage, dict(form.flags).get("maximize", False)) for name, storage in form.arrays),
        *trace.elements,
        *(_store(name, storage, ends.get(name), order) for order, (name, storage) in enumerate(form.arrays)),
        *(f"s{k} += {end};" for k, end in enumerate(sums)),
        "}",
        *(line for order, (name, storage) in enumerate(form.arrays) if storage in _SMALL for line in _pack(name, storage, order)),
        "}",
        *(f"sums[{k}] = s{k};" for k in range(len(sums))),
        "}",
        _RUN % {"chunk": CHUNK, "sums": len(sums), "pointers": len(names) + len(small), "numbers": len(form.numbers)},
    ]
    return "\n".join(lines)


def _reduced(how: str, names: list[str]) -> str:
    return f" reduction({how}:{','.join(names)})" if names else ""


def _pointers(form: Form) -> list[str]:
    lines = [
        f"{_TYPES[storage]}* __restrict A_{name} = ({_TYPES[storage]}*)a[{k}] + start;" for k, (name, storage) in enumerate(form.arrays)
    ]
    small = [name for name, storage in form.arrays if storage in _SMALL]
    return lines + [f"float* __restrict S_{name} = (float*)a[{len(lines) + k}] + start / {BLOCK};" for k, name in enumerate(small)]


def _load(name: str, storage: str, maximize: bool) -> str:
    if storage == "bfloat16":
        value = f"wide(A_{name}[i])"
    elif storage == "signed":
        value = f"A_{name}[i] * step_{name}"
    elif storage == "square":
        value = f"(A_{name}[i] * step_{name}) * (A_{name}[i] * step_{name})"
    else:
        value = f"A_{name}[i]"
    return f"const real {name} = {'-' if maximize and name == 'g' else ''}({value});"


def _store(name: str, storage: str, end: str | None, order: int) -> str:
    if storage in _SMALL:
        value = f"root({end or name})" if storage == "square" else end or name
        return f"w_{name}[k] = {value}; peak_{name} = highest(peak_{name}, bits(magnitude(w_{name}[k])));"
    if end is None:
        return ""
    if storage == "bfloat16":
        rounded = f"nearest({end})" if name == "p" else f"narrow({end}, {_noise(order)})"
        return f"A_{name}[i] = {rounded};"
    return f"A_{name}[i] = {end};"


def _pack(name: str, storage: str, order: int) -> list[str]:
    """Rounds one block to 8 bits. Its peak was found by its bits, among which what is not finite is largest; it makes the scale NaN."""
    levels, least = (127, "-127") if storage == "signed" else (255, f"w_{name}[k] > 0")
    return [
        f"const real most_{name} = of_bits(peak_{name}), scale_{name} = most_{name} + (most_{name} - most_{name});",
        f"S_{name}[j / {BLOCK}] = scale_{name};",
        f"const real grid_{name} = scale_{name} > {LEAST_SCALE}f ? {levels} / scale_{name} : 0;",
        "#pragma omp simd",
        f"for (int32_t k = 0; k < m; ++k) {{ const real u = int32_t{_noise(order)} * (1.0f / 65536);",
        f"const int32_t q = (int32_t)down(w_{name}[k] * grid_{name} + u), least = {least}, low = q > least ? q : least;",
        f"A_{name}[j + k] = ({_TYPES[storage]})(low < {levels} ? low : {levels}); }}",
    ]
