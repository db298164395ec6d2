"""Runs the bitwright command in children of a process that has imported everything, which start at once.

Each line of standard input is a JSON list: arguments, the file for what the command prints, and after how
many seconds it is killed, or null. The answer is a line with the exit status. Runs are small, so they are
cut into small pieces: files of targets, and what the best preset trains on.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback

import bitwright.cli.main
import bitwright.distill.targets
import bitwright.presets.best
import bitwright.public


def run(arguments: list[str], log: str) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    sys.argv = ["bitwright", *arguments]
    status = 0
    try:
        bitwright.cli.main.main()
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return status


for command in bitwright.cli.main.COMMANDS:
    importlib.import_module(f"bitwright.cli.{command}")
bitwright.distill.targets.SHARD_BYTES = 1 << 18
bitwright.presets.best.TRAINED_TOKENS = 1024

if __name__ == "__main__":
    for line in sys.stdin:
        arguments, log, delay = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(arguments, log))
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)  # it is there until it is waited for
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
