"""Jobs whose training runs are in the test's hands."""

import json
import sys
import time

from tests.serving.http.fakes import FILES
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.jobs.models import TrainableModel
from veratune.serving.store.base import Version

ROWS = [{"prompt": f"turn the light {word}", "completion": word} for word in ("on", "off")] * 4
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = TrainableModel("", "instruction", (("messages",), ("prompt", "completion")))

# Stands for `veratune train`: reports progress, waits for a file called go, writes an adapter.
TRAINER = """
import json, os, pathlib, shutil, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "run.yaml").write_text("x")
with (out / "starts").open("a") as starts:
    starts.write(f"resumed {'--resume' in words}\\n")
with open(os.environ["VERATUNE_PROGRESS_FILE"], "a") as progress:
    progress.write(json.dumps({"step": 1, "steps": 20}) + "\\n")
print("epoch 1  loss 0.5", file=sys.stderr, flush=True)
here = pathlib.Path(__file__).parent
while not (here / "go").exists():
    time.sleep(0.02)
if (here / "go").read_text() == "fail":
    sys.exit(f"veratune: {words[words.index('--data') + 1]}: the loss is not finite at step 3")
shutil.copy(here / "made.safetensors", out / "adapter.safetensors")
print(json.dumps({"path": "x", "trained": 7}))
"""


class JobBench:
    """Jobs with a fake `veratune train`. Options are those of Jobs."""

    def __init__(self, path, **options):
        self.path, self.options, self.published = path, options, []
        self.publish_error = None
        (path / "trainer.py").write_text(TRAINER)
        (path / "made.safetensors").write_bytes(FILES["alice"])
        self.open()

    def open(self):
        command = (sys.executable, str(self.path / "trainer.py"))
        self.jobs = Jobs(
            self.path / "jobs", {"base": CHAT}, self.publish, command=command, **self.options
        )
        self.jobs.worker.first_delay = 0.05

    def publish(self, tenant, name, data):
        if self.publish_error is not None:
            raise self.publish_error
        self.published.append((tenant, name, data))
        return Version(len(self.published), len(data), time.time())

    def go(self, how="go"):
        (self.path / "go").write_text(how)

    def create(self, tenant="ann", **more):
        file = self.jobs.add_file(tenant, "rows.jsonl", "fine-tune", LINES)
        return self.jobs.create(tenant, "base", file.id, **more)

    def until(self, job, *statuses, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            found = self.jobs.job(job.tenant, job.id)
            if found.status in statuses:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{found} is not {statuses}")

    def starts(self, job):
        return (self.path / "jobs" / job.id / "run" / "starts").read_text().split("\n")[:-1]

    def until_started(self, job, times=1, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            path = self.path / "jobs" / job.id / "run" / "starts"
            if path.exists() and len(self.starts(job)) == times:
                return
            time.sleep(0.02)
        raise AssertionError("the run did not start")
