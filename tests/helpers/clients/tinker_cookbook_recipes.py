"""tinker-cookbook's own training loops: SFT from a conversation file, resumed; arithmetic and a game by reinforcement.

Its arguments are the server's address, the model's folder, which is its name too, a file of conversations, and numbers
of steps. The last line is JSON: for each loop the metrics of its steps.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

URL, MODEL, FILE = sys.argv[1:4]
STEPS = int(sys.argv[4])
os.environ |= {"TINKER_API_KEY": "tml-local", "TINKER_BASE_URL": URL}

from tinker_cookbook import cli_utils  # noqa: E402
from tinker_cookbook.recipes.math_rl import train as math_rl  # noqa: E402
from tinker_cookbook.recipes.multiplayer_rl.guess_number.env import GuessNumberDatasetBuilder  # noqa: E402
from tinker_cookbook.rl import train as rl  # noqa: E402
from tinker_cookbook.supervised import train as supervised  # noqa: E402
from tinker_cookbook.supervised.data import FromConversationFileBuilder  # noqa: E402
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig  # noqa: E402

RENDERER = "role_colon"


def metrics(folder):
    """What a loop logged of each step; its last line are totals."""
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [one for one in lines if "grad_norm" in one]


def sft(folder, epochs):
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=128, batch_size=32
    )
    data = FromConversationFileBuilder(common_config=common, file_path=FILE, test_size=16)
    config = supervised.Config(
        log_path=folder, model_name=MODEL, dataset_builder=data, learning_rate=1e-3, num_epochs=epochs, lora_rank=8,
        base_url=URL, save_every=4, eval_every=4, recipe_name="sft",
    )  # fmt: skip
    asyncio.run(supervised.main(config))
    return metrics(folder)


def arithmetic(folder):
    config = math_rl.CLIConfig(
        model_name=MODEL, renderer_name=RENDERER, env="arithmetic", base_url=URL, log_path=folder, lora_rank=16,
        group_size=8, groups_per_batch=16, learning_rate=2e-3, max_tokens=8, loss_fn="importance_sampling",
        max_steps=STEPS, save_every=0, eval_every=0,
        behavior_if_log_dir_exists="delete",
    )  # fmt: skip
    asyncio.run(math_rl.cli_main(config))
    return metrics(folder)


def game(folder):
    data = GuessNumberDatasetBuilder(
        batch_size=4, model_name=MODEL, renderer_name=RENDERER, train_group_size=4, test_group_size=1
    )
    config = rl.Config(
        model_name=MODEL, log_path=folder, dataset_builder=data, learning_rate=1e-4, max_tokens=8, eval_every=0,
        compute_post_kl=True, loss_fn="importance_sampling", base_url=URL, max_steps=2, save_every=0, lora_rank=8,
        recipe_name="guess_number",
    )  # fmt: skip
    cli_utils.check_log_dir(folder, behavior_if_exists="delete")
    asyncio.run(rl.main(config))
    return metrics(folder)


seen = {"supervised": sft("sft", 1)}
seen["resumed"] = sft("sft", 2)
seen["arithmetic"] = arithmetic("arithmetic")
seen["game"] = game("game")
print(json.dumps(seen))
