"""mistral.rs opens a folder: greedy text after prompts.

Arguments: the folder; a JSON file of {"prompts": texts, "new_tokens": number}. The last line is {"generated": texts}.
"""

import json
import sys

from mistralrs import CompletionRequest, Runner, Which

folder, asked = sys.argv[1:]
with open(asked) as file:
    work = json.load(file)
runner = Runner(which=Which.Plain(model_id=folder))
generated = []
for prompt in work["prompts"]:
    request = CompletionRequest(model="default", prompt=prompt, max_tokens=work["new_tokens"], temperature=0.0)
    generated.append(runner.send_completion_request(request).choices[0].text)
print(json.dumps({"generated": generated}))
