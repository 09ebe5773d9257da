"""What others print that is of no use to our users does not reach them."""

import os
import subprocess
import sys

from training_runs import ROOT

PROGRAM = """
import sys
sys.modules["torch"] = None  # as if it was not installed
import e5v_jax.data.text  # which imports transformers
import transformers
assert not transformers.is_torch_available()
transformers.logging.get_logger("transformers").warning("another warning")
"""


def test_transformers_does_not_ask_for_torch() -> None:
    """Not in Python either, where other warnings of transformers are the user's own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.splitlines() == ["[transformers] another warning"]
