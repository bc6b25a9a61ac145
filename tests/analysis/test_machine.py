import torch

from veratune.analysis import machine


def test_a_machine_is_described(monkeypatch):
    about = machine.describe_machine()
    assert about["machine"]
    assert about["threads"] == torch.get_num_threads()
    assert about["torch"] == torch.__version__
    monkeypatch.setattr(machine, "PACKAGES", ("no-such-package",))
    assert "no-such-package" not in machine.describe_machine()
