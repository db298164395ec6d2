"""What the ranks of runs/test_distributed.py run: a function of bitwright, by its name and arguments."""

import json
import os
import signal
import sys
from typing import Any

import numpy as np

import bitwright
import bitwright.distill.targets
import bitwright.ranks
from bitwright.distill.adam import Adam
from bitwright.ranks import spread_over, world
from bitwright.runs.journal import Journal

call = json.loads(sys.argv[1])
bitwright.set_num_threads(1)
bitwright.distill.targets.SHARD_BYTES = 1 << 18
bitwright.ranks.FIXED_ROWS = 16
with spread_over(world(), call["fixed_order"]) as ranks:
    if call["kill"] is not None:
        step, commit = Adam.step, Journal.commit

        def committed(journal: Journal, blocks: int, *rest: Any) -> None:
            commit(journal, blocks, *rest)
            if ranks.rank == call["kill"] and blocks == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.commit = committed  # type: ignore[method-assign]

        def killed(adam: Adam, *arguments: Any) -> None:
            if ranks.rank == call["kill"] and adam.steps == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            step(adam, *arguments)

        Adam.step = killed  # type: ignore[method-assign]
    try:
        arguments = call["arguments"]
        if isinstance(arguments.get("calibration"), list):
            arguments["calibration"] = np.asarray(arguments["calibration"])
        found = getattr(bitwright, call["function"])(**arguments)
        said = getattr(found, "validations", None)
    except bitwright.BitwrightError as error:
        said = f"{type(error).__name__}: {error}"
    said = ranks.gather(said)  # all come to an end
    if ranks.is_first:
        print(json.dumps(said))
