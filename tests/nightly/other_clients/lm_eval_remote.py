"""lm-eval's tokenizer that asks the server, and its generation with it."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

url = sys.argv[1] + "/v1/completions"
assert check_remote_tokenizer_support(url)
tokenizer = RemoteTokenizer(url)
assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
with tempfile.TemporaryDirectory() as home:
    directory = Path(home)
    (directory / "cases.jsonl").write_text(json.dumps({"q": "The capital of France is", "a": "Paris is it"}) + "\n")
    (directory / "say.yaml").write_text(
        "task: say\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(directory / "cases.jsonl") + "}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['.'], do_sample: false, max_gen_toks: 16}\nmetric_list: [{metric: exact_match}]\n"
    )
    arguments = f"model=tiny,base_url={url},tokenizer_backend=remote,num_concurrent=1,max_retries=1"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "say",
        "--include_path", home, "--output_path", home, "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": home, "OPENAI_API_KEY": "any"}
    ended = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (samples,) = directory.rglob("samples_say_*.jsonl")
    assert json.loads(samples.read_text().splitlines()[0])["resps"][0][0] == "Paris is it"
print("lm_eval", version("lm_eval"))
