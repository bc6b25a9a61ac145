from veratune_lab.__main__ import main


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_reproduce_lists_its_experiments_and_names_mistakes(tmp_path, capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert "conv-mnist" in out
    status, _, err = run(capsys, "conv-minst")
    assert (status, "did you mean 'conv-mnist'" in err) == (2, True)
    status, _, err = run(capsys, "conv-mnist", "--quick", "--out", tmp_path)
    assert (status, "mnist is wanted: give --data FOLDER" in err) == (1, True)
    assert run(capsys, "conv-mnist", "--quick", "--full")[0] == 2
    status, _, err = run(capsys, "table1", "--threads", "-1")
    assert (status, "--threads: Not of type PositiveInt" in err) == (2, True)
