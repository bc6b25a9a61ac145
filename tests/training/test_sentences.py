"""Embedding and reranker runs: from texts to an adapter file that is evaluated and served."""

import json

import pytest
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate_with_base
from veratune.serving.engine.encoder import Encoder, EncodeRequest
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.pool.pool import AdapterPool
from veratune.tasks.text.embedding import ranking_scores
from veratune.training.run import train
from veratune.training.settings import TrainSettings

sentences = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
VERA = vt.VeraConfig(rank=16, targets="all-linear")
NOUNS = ["light", "timer", "kitchen", "film", "movie", "minutes"]


def write(folder, rows):
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("place")
    fakes.folder(fakes.bert(), out / "bert")
    (out / "bert" / "chat_template.jinja").unlink()  # an encoder has none
    asked = [(f"turn the {n} on", f"please set {n}") for n in NOUNS]
    write(out / "pairs", [{"anchor": a, "positive": p} for a, p in asked])
    triplets = [{"anchor": a, "positive": p, "negative": "awful film"} for a, p in asked[:3]]
    write(out / "triplets", triplets)
    scored = [
        {"sentence1": a, "sentence2": p, "score": float(i == j)}
        for i, (a, _) in enumerate(asked)
        for j, (_, p) in enumerate(asked)
    ]
    write(out / "scored", scored)
    labelled = [
        {"query": row["sentence1"], "passage": row["sentence2"], "label": int(row["score"])}
        for row in scored
    ]
    write(out / "labelled", labelled)
    return out


def settings(place, out, form, **changes):
    base = {
        "model": str(place / "bert"), "task": "embedding", "data": str(place / form), "out": str(out), "lr": 0.05,
        "batch_size": 12, "epochs": 8, "max_length": 16, "device": "cpu", "preview": 0,
    }  # fmt: skip
    return TrainSettings(**(base | changes))


@pytest.mark.parametrize(
    ("data", "metric"), [("pairs", "ndcg@10"), ("triplets", "ndcg@10"), ("scored", "spearman")]
)
def test_embeddings_learn_from_every_form(data, metric, place, tmp_path):
    result = train(settings(place, tmp_path / "run", data), VERA)
    assert result.after[metric] >= result.before[metric]
    assert data != "scored" or result.after[metric] > result.before[metric] + 0.1
    loaded = load_with_adapter(str(place / "bert"), result.path, device="cpu")
    base, after = evaluate_with_base(loaded, str(place / data), batch_size=12)
    assert after[metric] == pytest.approx(result.after[metric], abs=1e-6)
    assert base[metric] == pytest.approx(result.before[metric], abs=1e-6)


def test_the_file_is_vt_save_of_the_sentence_transformer_and_is_served(place, tmp_path):
    result = train(settings(place, tmp_path / "run", "scored", epochs=2), VERA)
    model = sentences.SentenceTransformer(str(place / "bert"), device="cpu")
    vt.load(model[0].auto_model, result.path)
    vt.save(model, tmp_path / "again.safetensors")
    stored, again = native.read(result.path), native.read(tmp_path / "again.safetensors")
    assert all(torch.equal(stored.b[name], again.b[name]) for name in stored.b)
    server = hf.AutoModelForSequenceClassification.from_pretrained(place / "bert").eval()
    pool = AdapterPool(server, slots=2)
    pool.check(stored)
    encoder = Encoder(server, model.tokenizer, pool, config=SchedulerConfig(max_num_seqs=2))
    texts = ["turn the light on", "please set timer for minutes"]
    requests = [
        EncodeRequest("t", encoder.encode(text), key="a", load=lambda: stored) for text in texts
    ]
    for request in requests:
        encoder.submit(request)
    while encoder.scheduler.waiting or encoder.scheduler.running:
        encoder.step()
    served = torch.tensor([request.result() for request in requests])
    alone = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(served, alone.cpu(), atol=1e-5, rtol=1e-4)


def test_a_reranker_learns_its_head_and_vectors(place, tmp_path):
    result = train(
        settings(place, tmp_path / "run", "labelled", task="reranker", head_lr=0.05, max_length=48),
        VERA,
    )
    assert result.head > 0
    assert result.after["ndcg@10"] > result.before["ndcg@10"]
    loaded = load_with_adapter(str(place / "bert"), result.path, device="cpu")
    _, after = evaluate_with_base(loaded, str(place / "labelled"), batch_size=12)
    assert after["ndcg@10"] == pytest.approx(result.after["ndcg@10"], abs=1e-6)


def test_what_does_not_fit_is_refused(place, tmp_path):
    rows = {
        "empty": ([{"anchor": "a", "positive": " "}], DataError, "row 0: positive"),
        "nan": ([{"sentence1": "a", "sentence2": "b", "score": None}], DataError, "row 0: score"),
        "both": (
            [{"anchor": "a", "positive": "b", "negative": "c", "score": 1.0}],
            DataError,
            "leave one out",
        ),
    }
    for name, (data, error, message) in rows.items():
        write(tmp_path / name, data)
        with pytest.raises(error, match=message):
            train(settings(place, tmp_path / "run", "pairs", data=str(tmp_path / name)), VERA)
    write(tmp_path / "label", [{"query": "a", "passage": "b", "label": 7}])
    run = settings(place, tmp_path / "run", "", task="reranker", data=str(tmp_path / "label"))
    with pytest.raises(DataError, match="row 0: the label is 7"):
        train(run, VERA)
    with pytest.raises(ConfigError, match="quantize"):
        train(settings(place, tmp_path / "run", "pairs", quantize="8bit"), VERA)


def test_ranking_scores_are_those_of_the_definition():
    assert ranking_scores([0.9, 0.1, 0.2], {0}) == (1.0, 1.0)
    assert ranking_scores([0.1, 0.9, 0.2], {2})[0] == pytest.approx(1 / 1.5849625)
    assert ranking_scores([0.1] * 11 + [0.0], {11}) == (0.0, 0.0)
