"""Speaks a child's part of server/supervisor.py without an engine: `fake_child.py ROLE FOLDER`, ROLE = core | frontend.

What its lives do stands in FOLDER/ROLE.json, a list with one object a life (the last one holds for all further lives):

    do      steps: {"say": event}, {"sleep": s}, {"exit": code}, {"signal": number (to itself)}, {"print": text},
            {"grandchild": true} (a process that holds on to stdout)
    drain   {"ignore": true}, or {"after": name} = exit 0 when FOLDER/name exists; without it: at once

It notes in FOLDER, per life, ROLE[index].N.first (first line, environment, pid, start), .said (commands) and .eof.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

role, folder = sys.argv[1], Path(sys.argv[2])
first = json.loads(sys.stdin.readline())
name = f"{role}{first.get('index', '')}"
life = len(list(folder.glob(f"{name}.*.first")))
lives = json.loads((folder / f"{role}.json").read_text())
plan = lives[min(life, len(lives) - 1)]
note = folder / f"{name}.{life}"


def write(suffix: str, value: object) -> None:
    """Appears at once and whole."""
    path = Path(f"{note}.{suffix}")
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)


def listen() -> None:
    said = []
    for line in sys.stdin:
        said.append(json.loads(line))
        write("said", said)
        if said[-1] == {"command": "drain"}:
            threading.Thread(target=drain, daemon=True).start()
    write("eof", True)
    os._exit(0)


def drain() -> None:
    manner = plan.get("drain", {})
    while manner.get("ignore") or ("after" in manner and not (folder / manner["after"]).exists()):
        time.sleep(0.01)
    os._exit(0)


def say(event: dict) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def beat() -> None:
    while True:
        say({"event": "heartbeat", "phase": "ready", "detail": ""})
        time.sleep(0.05)


write("first", {"line": first, "env": dict(os.environ), "pid": os.getpid(), "start": time.monotonic()})
threading.Thread(target=listen, daemon=True).start()
if role == "core":
    threading.Thread(target=beat, daemon=True).start()
for step in plan["do"]:
    match step:
        case {"say": event}:
            say(event)
        case {"sleep": seconds}:
            time.sleep(seconds)
        case {"exit": code}:
            os._exit(code)
        case {"signal": number}:
            os.kill(os.getpid(), number)
        case {"print": text}:
            print(text, flush=True)
        case {"grandchild": True}:
            sleeper = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)"]
            subprocess.Popen(sleeper, stdin=subprocess.DEVNULL)
threading.Event().wait()
