"""What the ranks of tests/test_distributed.py run: a function of bitwright, by its name and arguments."""

import json
import os
import signal
import sys
from typing import Any

import bitwright
import bitwright.targets
from bitwright.distributed import spread_over, world
from bitwright.methods.adam import Adam

call = json.loads(sys.argv[1])
bitwright.set_num_threads(1)
bitwright.targets.SHARD_BYTES = 1 << 18
with spread_over(world(), call["fixed_order"]) as ranks:
    if call["kill"] is not None:
        step = Adam.step

        def killed(adam: Adam, *arguments: Any) -> None:
            if ranks.rank == call["kill"] and adam.steps == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            step(adam, *arguments)

        Adam.step = killed  # type: ignore[method-assign]
    try:
        found = getattr(bitwright, call["function"])(**call["arguments"])
        said = getattr(found, "validations", None)
    except bitwright.BitwrightError as error:
        said = f"{type(error).__name__}: {error}"
    said = ranks.gather(said)  # all come to an end
    if ranks.is_first:
        print(json.dumps(said))
