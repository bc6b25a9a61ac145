"""guidellm: a benchmark of chat completions and completions without a failed request."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:]
for route in ("/v1/chat/completions", "/v1/completions"):
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                str(Path(sys.executable).with_name("guidellm")), "run",
                "--backend", f"kind=openai_http,target={url},model=smollm2,request_format={route}",
                "--profile", "kind=concurrent,streams=2",
                "--constraint", "kind=max_requests,count=6",
                "--tokenizer", f"kind=hf_auto,model={model}",
                "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=12",
                "--output", f"kind=json,path={report}",
                "--disable-console",
            ],
            check=True,
        )  # fmt: skip
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        print(route, totals, flush=True)
        assert totals["successful"] == totals["total"] >= 4  # it may stop before the sixth one
print("ok")
