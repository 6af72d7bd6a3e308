"""What needs no tensor imports no torch, and nothing else that takes long."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAIN = "from dllm.cli.main import VERBS, main; "
REPORT = ", ".join(f"dllm.report.{name}" for name in ("plan", "load", "tables", "figures", "claims", "page"))
LIGHT = {
    "the package": ("import dllm; dllm.GenerateSettings", "torch"),
    "the configuration": ("import dllm.config, dllm.report.plan", "torch"),
    "the report": (f"import {REPORT}", "torch transformers lm_eval matplotlib.pyplot"),
    "a plan": (MAIN + "assert main(['plan', 'config/laptop.yaml']) == 0", "torch transformers numpy pandas"),
    "the help": (
        MAIN + "assert main(['--help']) == 0 and not any(main([verb, '--help']) for verb in VERBS)",
        "torch transformers pandas lm_eval datasets rich pydantic",
    ),
    "the settings of an evaluation": (
        "import dllm.cli.evaluate, dllm.evaluation.evaluate",
        "torch lm_eval transformers datasets numpy",
    ),
}


@pytest.mark.parametrize("name", LIGHT)
def test_what_needs_no_tensor_imports_no_torch(name):
    code, heavy = LIGHT[name]
    code = f"import sys; {code}; sys.exit(' '.join(set({heavy.split()}) & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
