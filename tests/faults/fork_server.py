"""Starts the programs at once: a process that has imported everything, and forks for every start.

Reads a JSON object a line on standard input and answers with one a line on standard output:

{"start": [script, ...words], "env": {}, "log": path, "file_bytes": limit or null,
 "crash": {"at": n, "signal": s} or null, "emulated": true or false}     → {"pid": n}
{"poll": pid}                                 → {"status": exit status, minus the signal that ended it, or null}

With "crash", the program gets the signal as it is about to make its n-th change to the disk: it opens a file for
writing, fsyncs, renames, or deletes. LOG.changes then says how many there were.

With "emulated", the program finds two emulated GPUs. A script may also be a module of tests that has a `main(words)`.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import resource
import sys
import traceback

import emulated_cuda

SCRIPTS = ("main_text2image", "finetune", "generate", "metrics", "convert")
CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def warm_up() -> None:
    """Import what the programs import late."""
    for name in (*SCRIPTS, "accelerate", "open_clip", "torchvision"):
        importlib.import_module(name)
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401


class Changes:
    """Counts the program's changes to the disk, and sends a signal before one of them."""

    def __init__(self, at: int, signal: int):
        self.at, self.signal, self.count = at, signal, 0
        for name in CHANGES:
            setattr(os, name, self.before(getattr(os, name)))
        builtins.open = self.before_writing(builtins.open)

    def before(self, call):
        def counted(*args, **kwargs):
            self.tick()
            return call(*args, **kwargs)

        return counted

    def before_writing(self, call):
        def counted(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+"):
                self.tick()
            return call(file, mode, *args, **kwargs)

        return counted

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.signal)


def program(order: dict) -> int:
    """Run one program in this process, which was forked for it; returns its exit status."""
    script, *words = order["start"]
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for target, source in enumerate((null, log, log)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    if order.get("emulated"):
        emulated_cuda.install()
    if order.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    crash = order.get("crash") or {}
    from vqdm.cli import run_script

    changes = Changes(crash["at"], crash["signal"]) if crash else None
    status = run_script(importlib.import_module(script).main, words)
    if changes:
        with open(f"{order['log']}.changes", "w") as file:
            file.write(str(changes.count))
    return status


def forked(order: dict) -> int:
    """The id of a new process that runs a program."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        status = program(order)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def polled(child: int) -> int | None:
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    warm_up()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"pid": forked(order)} if "start" in order else {"status": polled(order["poll"])}
        print(json.dumps(answer), flush=True)
    os._exit(0)  # without taking down everything that was imported


if __name__ == "__main__":
    main()
