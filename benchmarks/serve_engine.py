"""The other side of serve.py: the same work in the engine without a server, in a process of its own.

JSON lines. The first on stdin: {"model", "options"}, arguments of `jaxserve.LLM`; answered with {"ready": true}. Each
further one a job as for serve_client.py, of which only the work counts; answered with {"wall_s"}. EOF ends it.
"""

import json
import os
import sys
import time
from typing import Any

import jaxserve


def seconds(llm: jaxserve.LLM, job: dict[str, Any]) -> float:
    """How long the engine takes. Raises SystemExit if an answer has another length than was asked for."""
    requests = job["requests"]
    prompts = [request["prompt"] for request in requests]
    params = [
        jaxserve.SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
        for request in requests
    ]
    calls = [slice(i, i + 1) for i in range(len(requests))] if job["sequential"] else [slice(None)]
    start = time.perf_counter()
    outputs = [
        output
        for call in calls
        for output in llm.generate(prompts[call], params[call], cache_salt=job["cache_salt"], show_progress=False)
    ]
    taken = time.perf_counter() - start
    for output, request in zip(outputs, requests, strict=True):
        if len(output.outputs[0].token_ids) != request["max_tokens"]:
            raise SystemExit(f"{len(output.outputs[0].token_ids)} tokens came, {request['max_tokens']} were asked for")
    return taken


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    start = json.loads(sys.stdin.readline())
    with jaxserve.LLM(start["model"], show_progress=False, **start["options"]) as llm:
        print(json.dumps({"ready": True}), file=out)
        for line in sys.stdin:
            print(json.dumps({"wall_s": seconds(llm, json.loads(line))}), file=out)


if __name__ == "__main__":
    main()
