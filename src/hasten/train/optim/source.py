"""From a rule to C++: one loop that loads every array once, computes, and stores every array once.

Buffers may be stored small. bfloat16 is widened exactly and stored with stochastic rounding: with rounding to the nearest, an average
with β = 0.999 changes by less than half a step of bfloat16 and would stand still. 8 bits: a scale for every 256 elements; "signed" holds
q·s/127, "square" (of what is never negative) (q·s/255)², q ≥ 1 where the value is above 0, so that no step is divided by a lost
average. Both are rounded stochastically; the noise is a hash of (element, step), the same in `plain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.train.optim.expression import Rule, traced

BLOCK = 256
_TYPES = {"float32": "float", "float64": "double", "bfloat16": "uint16_t", "signed": "int8_t", "square": "uint8_t"}
_SMALL = ("signed", "square")


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


_HEAD = """#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
typedef %s real;
static inline real sign(real x) { return real(x > 0) - real(x < 0); }
static inline real larger(real a, real b) { return a > b || a != a ? a : b; }
static inline uint32_t noise(uint32_t i, uint32_t seed) {
  uint32_t h = (i + seed) * 0x9E3779B9u;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  return h ^ (h >> 13);
}
static inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static inline float wide(uint16_t x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline uint16_t narrow(float x, uint32_t more) {
  return std::isfinite(x) ? uint16_t((bits(x) + more) >> 16) : uint16_t((bits(x) >> 16) | (x != x ? 64u : 0u));
}
static inline uint16_t nearest(float x) { return narrow(x, 0x7FFFu + ((bits(x) >> 16) & 1u)); }
"""

_RUN = """
extern "C" void run(int64_t tensors, const int64_t* sizes, void* const* arrays, const double* h, uint32_t seed, double* sums, int threads) {
  std::vector<int64_t> first(tensors + 1, 0);
  for (int64_t t = 0; t < tensors; ++t) first[t + 1] = first[t] + (sizes[t] + %(chunk)d - 1) / %(chunk)d;
  const int64_t chunks = first[tensors];
  std::vector<double> parts(chunks * %(sums)d + 1);
  #pragma omp parallel for schedule(static) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t t = std::upper_bound(first.begin(), first.end(), c) - first.begin() - 1;
    const int64_t start = (c - first[t]) * %(chunk)d;
    span(start, std::min<int64_t>(%(chunk)d, sizes[t] - start), arrays + t * %(pointers)d, h, seed, &parts[c * %(sums)d]);
  }
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < %(sums)d; ++s) sums[s] += parts[c * %(sums)d + s];
}
"""
CHUNK = 16384


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
        f"const int64_t m = std::min<int64_t>({block}, count - j);",
        *(f"real w_{name}[{BLOCK}]; real scale_{name} = S_{name}[j / {BLOCK}];" for name, _ in small),
        "#pragma omp simd" + (f" reduction(+:{','.join(f's{k}' for k in range(len(sums)))})" if sums else ""),
        "for (int64_t k = 0; k < m; ++k) { const int64_t i = j + k;",
        *(_load(name, storage, dict(form.flags).get("maximize", False)) for name, storage in form.arrays),
        *trace.elements,
        *(_store(name, storage, ends.get(name), order) for order, (name, storage) in enumerate(form.arrays)),
        *(f"s{k} += {end};" for k, end in enumerate(sums)),
        "}",
        *(line for order, (name, storage) in enumerate(form.arrays) if storage in _SMALL for line in _pack(name, storage, order)),
        "}",
        *(f"sums[{k}] = s{k};" for k in range(len(sums))),
        "}",
        _RUN % {"chunk": CHUNK, "sums": len(sums), "pointers": len(names) + len(small)},
    ]
    return "\n".join(lines)


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
        value = f"A_{name}[i] * scale_{name} / 127.0f"
    elif storage == "square":
        value = f"(A_{name}[i] * scale_{name} / 255.0f) * (A_{name}[i] * scale_{name} / 255.0f)"
    else:
        value = f"A_{name}[i]"
    return f"const real {name} = {'-' if maximize and name == 'g' else ''}({value});"


def _store(name: str, storage: str, end: str | None, order: int) -> str:
    if storage in _SMALL:
        return f"w_{name}[k] = {end or name};"
    if end is None:
        return ""
    if storage == "bfloat16":
        rounded = f"nearest({end})" if name == "p" else f"narrow({end}, noise(uint32_t(start + i), seed + {order}u) & 0xFFFFu)"
        return f"A_{name}[i] = {rounded};"
    return f"A_{name}[i] = {end};"


def _pack(name: str, storage: str, order: int) -> list[str]:
    """Rounds one block to 8 bits; what is not finite makes the scale, and so the block, NaN."""
    levels, least = (127, "-127.0f") if storage == "signed" else (255, f"(w_{name}[k] > 0 ? 1.0f : 0.0f)")
    root = f"std::sqrt(w_{name}[k])" if storage == "square" else f"w_{name}[k]"
    return [
        f"real peak_{name} = 0, bad_{name} = 0;",
        f"#pragma omp simd reduction(max:peak_{name}) reduction(+:bad_{name})",
        f"for (int64_t k = 0; k < m; ++k) {{ const real x = std::abs(w_{name}[k]); peak_{name} = x > peak_{name} ? x : peak_{name};"
        f" bad_{name} += x * 0; }}",
        f"scale_{name} = {f'std::sqrt(peak_{name})' if storage == 'square' else f'peak_{name}'} + bad_{name};",
        f"S_{name}[j / {BLOCK}] = scale_{name};",
        f"const real grid_{name} = scale_{name} > 0 ? {levels} / scale_{name} : 0;",
        "#pragma omp simd",
        f"for (int64_t k = 0; k < m; ++k) {{ const real u = (noise(uint32_t(start + j + k), seed + {order}u) & 0xFFFFu) / 65536.0f;",
        f"const real q = std::floor({root} * grid_{name} + u), least = {least};",
        f"A_{name}[j + k] = ({_TYPES[storage]})(int32_t)(q > least ? (q < {levels} ? q : {levels}) : least); }}",
    ]
