import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

with tempfile.TemporaryDirectory() as home:
    url = sys.argv[1] + "/v1"
    (Path(home) / "extra-openai-models.yaml").write_text(f"- {{model_id: tiny, model_name: tiny, api_base: '{url}'}}\n")
    environment = os.environ | {"LLM_USER_PATH": home, "OPENAI_API_KEY": "any"}
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "tiny", "hi", *more]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.stdout.strip() == "Paris is it.", ended.stdout + ended.stderr
print("llm", version("llm"))
