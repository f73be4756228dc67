"""Files that are meant to harm, made by code: one small function or one row for each. `CASES` is all of them.

A case that `reading` refuses never reaches a library: the tests hold each of those in this process. The others need a guarded
child; `benchmarks/hostile.py` opens all of them in one.
"""

from hostile import checkpoints, containers, data, folders, graphs, keras_files, loops, paths, programs, tensors, words  # noqa: F401
from hostile.cases import CASES, Case, Trap

__all__ = ["CASES", "Case", "Trap"]
