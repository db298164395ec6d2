"""Fuzzes what reads files, guided by coverage: the targets of hostile/, changed as atheris likes.

Usage, in an environment with ``pip install ".[fuzz]"``::

    python tests/fuzz.py TARGET [arguments of libFuzzer, such as -max_total_time=300 or a corpus folder]

What fails is described, and written to a file ``crash-…``; that file as the only argument repeats it. The
description belongs into FOUND in hostile/test_hostile.py.
"""

import sys
from pathlib import Path

import atheris

sys.path.append(str(Path(__file__).parent / "support"))

with atheris.instrument_imports(include=["bitwright"]):
    from hostile.targets import TARGETS
    from hostile.test_hostile import hypothesis_test

# Our own alarm and our own limit of memory are stricter.
ARGUMENTS = ["-handle_alrm=0", "-rss_limit_mb=0", "-max_len=4096", "-len_control=0"]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} TARGET [arguments]\ntargets: {', '.join(TARGETS)}")
    test = hypothesis_test(sys.argv[1])
    atheris.Setup([sys.argv[0], *ARGUMENTS, *sys.argv[2:]], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
