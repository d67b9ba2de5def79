"""Serve a model over HTTP and call it with the ``openai`` client.

    python examples/serve_and_call.py [MODEL]

MODEL is a local folder with a tokenizer; without it a small random model is made.
"""

import subprocess
import sys
import tempfile

from openai import OpenAI

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
if len(sys.argv) == 1:
    from toolkit.testing.models import random_model, tiny_tokenizer

    random_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

command = [sys.executable, "-m", "toolkit.cli", "serve", folder, "--port", "0", "--served-model-name", "mine"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
try:
    assert server.stdout is not None
    address = next(line.split("http://")[1].split()[0] for line in server.stdout if "http://" in line)
    client = OpenAI(base_url=f"http://{address}/v1", api_key="unused")

    completion = client.completions.create(model="mine", prompt="def main():", max_tokens=16, temperature=0)
    print("completion:", repr(completion.choices[0].text))

    stream = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "Hello"}], max_tokens=16, seed=1, stream=True
    )
    print("chat:", repr("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)))
finally:
    server.terminate()
    server.wait(timeout=30)
