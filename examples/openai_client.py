"""Serve a model and call it with OpenAI's client.

    pip install "twotower[serve]" openai
    python examples/openai_client.py

The example starts `twotower serve` on a free port and stops it at the end. Against a server that is running already,
only the lines from `client =` on are needed.
"""

import socket
import subprocess
import sys
import time
import urllib.request

import openai

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
server = subprocess.Popen([sys.executable, "-m", "twotower", "serve", "--port", str(port), "--log-level", "warning"])
try:
    while True:  # loading takes a few seconds, and compiling the kernels once as long again
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:  # nobody listens yet
            if server.poll() is not None:
                sys.exit("the server did not start; its last lines say why")
            time.sleep(0.2)

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    model = client.models.list().data[0].id

    # What OpenAI's API does not know, such as the mode, goes into extra_body.
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=32, temperature=0, extra_body={"mode": "verified"}
    )
    print(answer.choices[0].text)
    print(answer.usage)

    stream = client.completions.create(
        model=model,
        prompt="The little dog",
        max_tokens=32,
        temperature=0,
        stream=True,
        extra_body={"mode": "diffusion"},
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()
finally:
    server.terminate()  # running requests finish first
    server.wait(30)
