"""What schemathesis cannot know: names that are there, and files that do no harm here."""

import itertools
import os

import schemathesis

SCENE = os.environ["KICKLESS_SCENE"]
NAMES = os.environ["KICKLESS_NAMES"].split()
# What would be made, opened or run.
TURN = itertools.count()
FILES = {"socket-path", "blk-file", "record", "file", "program", "key-file", "base", "path", "config"}


def one_of(items):
    return items[next(TURN) % len(items)]


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    # The first one stays; others may go, and come back by the calls that make them.
    if path_parameters and isinstance(path_parameters.get("number"), int) and next(TURN) % 2:
        path_parameters["number"] = 1
    if path_parameters and isinstance(path_parameters.get("name"), str) and next(TURN) % 4:
        deletes = context.operation.method.lower() == "delete" and context.operation.path.endswith("{name}")
        path_parameters["name"] = one_of(NAMES[1:] + ["new"] if deletes else NAMES)
    return path_parameters


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        for key in FILES & body.keys():
            if isinstance(body[key], str):
                body[key] = os.path.join(SCENE, f"schema{next(TURN) % 5}")
        # A descriptor that happens to be there is not for others; nor is an interface of this machine.
        for key in ("fd", "key-fd", "tap", "tap-fds", "af-xdp", "macvtap", "fault", "clone-of", "key-credential"):
            body.pop(key, None)
        if "socket-path" in body and isinstance(body.get("name"), str) and next(TURN) % 2:
            body.update(name="new")
        if isinstance(body.get("switch"), str) and next(TURN) % 2:
            body.update(switch="kept")
    return body
