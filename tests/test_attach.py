import copy
import threading
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterError, TargetError, UnsupportedError
from veratune.layers.wrapper import VeraLayer
from veratune.model_state import vectors_of

TOKENS = torch.arange(2, 26).view(3, 8)


def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


def two_adapters(model=None):
    """One model, two adapters with other targets, ranks, seeds, sharing and dtypes."""
    model = fakes.llama() if model is None else model
    vt.attach(model, vt.VeraConfig(rank=16), "alice")
    vt.attach(
        model,
        vt.VeraConfig(
            rank=40,
            targets="all-linear",
            exclude=["down_proj"],
            seed=9,
            sharing="per_shape",
            dtype="bfloat16",
        ),
        "bob",
    )
    return scramble(scramble(model, "alice"), "bob", seed=1)


def alone(config, seed):
    return scramble(vt.attach(fakes.llama(), config, "x"), "x", seed=seed)


def test_attach_changes_nothing_until_it_is_trained():
    model, plain = fakes.llama(), fakes.llama()
    out = vt.attach(model, vt.VeraConfig(rank=16), "alice")
    assert out is model
    assert type(model) is type(plain)
    assert torch.equal(logits(model), logits(plain))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.{q}_proj.vera.alice.whole.{v}"
        for i in (0, 1)
        for q in "qv"
        for v in "db"
    }


@pytest.mark.parametrize(("layers", "width", "wanted"), [(24, 1024, 98_304), (36, 1280, 165_888)])
def test_gpt2_query_and_value_have_vectors_of_their_own(layers, width, wanted):
    with torch.device("meta"):
        model = fakes.gpt2(layers, width)
    vt.attach(model, vt.VeraConfig(rank=1024), "a")
    assert vt.count_trained(model, "a") == wanted


def test_two_adapters_compute_as_if_each_were_alone():
    model = two_adapters()
    first = logits(alone(vt.adapters(model)["alice"], 0))
    second = logits(alone(vt.adapters(model)["bob"], 1))
    vt.use(model, "alice")
    assert torch.equal(logits(model), first)
    vt.use(model, "bob")
    assert torch.equal(logits(model), second)
    vt.use(model, None)
    assert torch.equal(logits(model), logits(fakes.llama()))


def test_an_adapter_of_lower_rank_may_come_second():
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=64), "high")
    vt.attach(model, vt.VeraConfig(rank=2), "low")
    scramble(model, "low")
    assert torch.equal(logits(model), logits(alone(vt.VeraConfig(rank=2), 0)))


@pytest.mark.parametrize("make", [fakes.llama, fakes.gpt2])
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(make):
    model = two_adapters(make()) if make is fakes.llama else None
    if model is None:
        model = vt.attach(make(), vt.VeraConfig(rank=16), "alice")
        vt.attach(model, vt.VeraConfig(rank=16, seed=2, targets=["c_attn.k", "c_proj"]), "bob")
        scramble(scramble(model, "alice"), "bob", seed=1)
    vt.attach(model, vt.VeraConfig(rank=16), "carol")  # on alice's basis
    scramble(model, "carol", seed=2)
    names = ["bob", "alice", None, "carol", "alice", "bob"]
    tokens = torch.randint(2, 290, (6, 7))
    with vt.rows(model, names):
        mixed = logits(model, tokens)
    for i, name in enumerate(names):
        vt.use(model, name)
        torch.testing.assert_close(mixed[i], logits(model, tokens)[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            mixed[i : i + 1], logits(model, tokens[i : i + 1]), rtol=1e-4, atol=1e-5
        )


def test_rows_repeat_for_beams_and_nest():
    model = two_adapters()
    tokens = torch.randint(2, 290, (4, 5))
    with vt.rows(model, ["alice", None]):
        doubled = logits(model, tokens)
        with vt.rows(model, ["bob"]):
            inner = logits(model, tokens)
        assert torch.equal(logits(model, tokens), doubled)
    vt.use(model, "alice")
    torch.testing.assert_close(doubled[:2], logits(model, tokens[:2]))
    vt.use(model, "bob")
    torch.testing.assert_close(inner, logits(model, tokens))


def test_rows_generate_as_each_alone():
    model = two_adapters()
    names, prompt = ["alice", "bob", None], torch.randint(2, 290, (3, 6))
    with vt.rows(model, names):
        mixed = model.generate(prompt, max_new_tokens=8, do_sample=False)
        beams = model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False)
    for i, name in enumerate(names):
        vt.use(model, name)
        assert torch.equal(
            model.generate(prompt[i : i + 1], max_new_tokens=8, do_sample=False)[0], mixed[i]
        )
        assert torch.equal(
            model.generate(prompt[i : i + 1], max_new_tokens=6, num_beams=3, do_sample=False)[0],
            beams[i],
        )


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    model = two_adapters()
    tokens = torch.randint(2, 290, (2, 5))
    with vt.rows(model, ["alice", "bob"]):
        logits(model, tokens).square().sum().backward()
    for i, name in enumerate(["alice", "bob"]):
        mixed = [p.grad.clone() for v in vectors_of(model, name) for p in v.parameters()]
        model.zero_grad()
        vt.use(model, name)
        logits(model, tokens[i : i + 1]).square().sum().backward()
        own = [p.grad for v in vectors_of(model, name) for p in v.parameters()]
        for a, b in zip(mixed, own, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)
        model.zero_grad()
        with vt.rows(model, ["alice", "bob"]):
            logits(model, tokens).square().sum().backward()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["alcie"], "no adapter 'alcie'; the model has 'alice', 'bob'; did you mean 'alice'?"),
        ("alice", "rows wants one adapter name .* not 'alice'"),
        ([], r"rows wants one adapter name .* not \[\]"),
    ],
)
def test_bad_rows(names, message):
    with pytest.raises(AdapterError, match=message), vt.rows(two_adapters(), names):
        pass


def test_rows_of_another_number_are_refused():
    model = two_adapters()
    with (
        vt.rows(model, ["alice", "bob"]),
        pytest.raises(ValueError, match=r"got a batch of 3 rows; rows\(\) named 2 adapters"),
    ):
        logits(model)
    logits(model)  # and the model works on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["alice", "bob"])
def test_merge_and_unmerge_give_back_every_bit(dtype, name):
    model = two_adapters(fakes.llama().to(dtype))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = vt.merge(model, name)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert len(report) == (4 if name == "alice" else 12)
    vt.unmerge(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_merged_is_the_same_function(name):
    model = two_adapters()
    vt.use(model, name)
    y = logits(model)
    vt.merge(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)


def test_merging_into_few_bits_says_what_was_lost():
    model = vt.attach(fakes.llama().bfloat16(), vt.VeraConfig(rank=16), "a")
    scramble(model, "a", size=1e-3)
    with pytest.warns(UserWarning, match=r"merging 'a' rounded away \d+% of ΔW"):
        report = vt.merge(model)
    assert all(entry.lost > 0.05 for entry in report)
    fine = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=16), "a"), "a", size=1e-3)
    assert all(entry.lost < 1e-3 for entry in vt.merge(fine))


def test_a_merged_model_refuses_what_it_cannot_do():
    model = two_adapters()
    vt.merge(model, "alice")
    for act in (
        lambda: vt.use(model, "bob"),
        lambda: vt.use(model, None),
        lambda: vt.merge(model, "bob"),
    ):
        with pytest.raises(AdapterError, match="'alice' is merged"):
            act()
    with pytest.raises(AdapterError, match="merged"), vt.rows(model, ["alice"]):
        pass
    keys = list(model.state_dict())
    with pytest.raises(
        AdapterError, match="'alice' is merged into the weights; unmerge before adding 'carol'"
    ):
        vt.attach(model, vt.VeraConfig(rank=2), "carol")
    assert list(model.state_dict()) == keys
    assert list(vt.adapters(model)) == ["alice", "bob"]
    vt.unmerge(model)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        vt.unmerge(model)


def test_a_tied_weight_is_not_merged():
    model = fakes.llama(tie_word_embeddings=True)
    vt.attach(model, vt.VeraConfig(rank=4, targets=["lm_head"]), "a")
    with pytest.raises(
        UnsupportedError, match="layer 'lm_head' shares its weight with another module"
    ):
        vt.merge(model)


def test_detach_gives_back_the_very_modules():
    model = fakes.llama()
    modules, flags = (
        dict(model.named_modules()),
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    model.model.embed_tokens.weight.requires_grad_(False)
    flags["model.embed_tokens.weight"] = False
    two_adapters(model)
    vt.detach(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert vt.adapters(model) == {}


def test_detach_can_leave_a_plain_model_that_has_learned():
    model = two_adapters()
    vt.use(model, "alice")
    y = logits(model)
    vt.merge(model)
    vt.detach(model, keep_merged=True)
    assert not any(isinstance(m, VeraLayer) for m in model.modules())
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="has no adapters"):
        vt.detach(model)


def test_remove_takes_one_and_leaves_the_other():
    model = two_adapters()
    vt.use(model, "alice")
    y = logits(model)
    vt.remove(model, "bob")
    assert torch.equal(logits(model), y)
    assert sum(isinstance(m, VeraLayer) for m in model.modules()) == 4
    vt.remove(model, "alice")
    assert not any(isinstance(m, VeraLayer) for m in model.modules())


@pytest.mark.parametrize("name", ["", "a.b", "items", "forward"])
def test_names_that_torch_cannot_have(name):
    with pytest.raises(AdapterError, match="cannot be used"):
        vt.attach(fakes.llama(), vt.VeraConfig(rank=2), name)


def test_a_failed_attach_leaves_no_trace():
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=4), "a")
    keys = list(model.state_dict())
    for config, name in (
        (vt.VeraConfig(rank=2), "a"),
        (vt.VeraConfig(targets=["nope"]), "b"),
        (vt.VeraConfig(head=["nope"]), "c"),
    ):
        with pytest.raises((AdapterError, TargetError)):
            vt.attach(model, config, name)
    assert list(model.state_dict()) == keys
    assert list(vt.adapters(model)) == ["a"]


def test_a_shared_layer_is_replaced_wherever_it_stands():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    vt.attach(model, vt.VeraConfig(rank=3, targets="all-linear"), "a")
    assert model[0] is model[2]
    assert vt.count_trained(model, "a") == 8
    vt.detach(model)
    assert model[0] is shared
    assert model[2] is shared


def test_heads_are_each_adapters_own():
    model = fakes.bert(labels=3)
    for name, seed in (("alice", 0), ("bob", 1)):
        vt.attach(model, vt.VeraConfig(rank=8, head=["classifier"]), name)
        scramble(model, name, seed)
    alone = {}
    for name in ("alice", "bob", None):
        vt.use(model, name)
        alone[name] = logits(model)
    assert torch.equal(alone[None], logits(fakes.bert(labels=3)))
    assert not torch.allclose(alone["alice"], alone["bob"])
    with vt.rows(model, ["bob", None, "alice"]):
        mixed = logits(model)
    for i, name in enumerate(("bob", None, "alice")):
        torch.testing.assert_close(mixed[i], alone[name][i])
    vt.merge(model, "bob")
    vt.detach(model, keep_merged=True)
    torch.testing.assert_close(logits(model), alone["bob"])


def test_a_module_is_adapted_or_trained_in_full_but_not_both():
    model = vt.attach(fakes.bert(labels=2), vt.VeraConfig(rank=4, targets=["classifier"]), "a")
    with pytest.raises(
        UnsupportedError, match="head 'classifier' holds the adapted layer 'classifier'"
    ):
        vt.attach(model, vt.VeraConfig(rank=4, head=["classifier"]), "b")


def test_state_dict_keeps_the_base_models_names():
    model, plain = two_adapters(), fakes.llama()
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    assert all(".vera." in k for k in set(state) - set(plain.state_dict()))
    other = two_adapters()
    scramble(other, "bob", seed=5)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".vera." in k for k in missing)


def test_save_pretrained_still_writes_the_base_model(tmp_path):
    model = two_adapters()
    with pytest.warns(UserWarning, match="transformers alone loads the bare base model"):
        model.save_pretrained(tmp_path)
    vt.detach(model)
    assert "save_pretrained" not in model.__dict__
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_deepcopy_is_apart():
    model = two_adapters()
    vt.use(model, "bob")
    other = copy.deepcopy(model)
    y = logits(model)
    assert torch.equal(logits(other), y)
    scramble(other, "bob", seed=3)
    assert torch.equal(logits(model), y)
    assert not torch.equal(logits(other), y)
    assert vectors_of(other, "bob")[0].basis is vectors_of(model, "bob")[0].basis
    vt.detach(other)
    vt.use(model, "alice")


def test_to_dtype_moves_everything():
    model = two_adapters().to(torch.float64)
    vt.use(model, "alice")
    reference = two_adapters()
    vt.use(reference, "alice")
    torch.testing.assert_close(logits(model).float(), logits(reference), rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = two_adapters()
    vt.use(model, "alice")
    y = logits(model)
    with torch.autocast("cpu", dtype):
        low = logits(model)
    assert torch.cosine_similarity(low.float().flatten(), y.flatten(), dim=0) > 0.999


def test_compile_without_graph_breaks():
    model = two_adapters()
    vt.use(model, "bob")
    y = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), y)
    logits(compiled).sum().backward()
    assert all(p.grad is not None for v in vectors_of(model, "bob") for p in v.parameters())
    vt.use(model, None)
    torch.testing.assert_close(logits(compiled), logits(fakes.llama()))


def test_a_layer_of_blocks_compiles_without_graph_breaks():
    model = torch.nn.Sequential(torch.nn.Linear(24, 16)).requires_grad_(False)
    model = scramble(
        vt.attach(model, vt.VeraConfig(rank=16, targets=["0"], basis="monarch")), "default"
    )
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for rows in (2, 600):  # "factored", and W + ΔW
            x = torch.linspace(-1, 1, rows * 24).view(rows, 24).requires_grad_()
            run(x).square().sum().backward()
            vectors = vectors_of(model, "default")
            found.append([x.grad, *(p.grad.clone() for v in vectors for p in v.parameters())])
            model.zero_grad()
    for eager, compiled in zip(found[:2], found[2:], strict=True):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"plan": p} for p in ("factored", "projected", "merged", "dense")]
    + [{"basis": "monarch", "plan": p} for p in ("auto", "factored", "projected", "merged")],
)
def test_every_plan_compiles_and_its_gradients_too(settings):
    model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=8, **settings), "a"), "a").train()
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits(run).square().sum().backward()
        grads.append([p.grad.clone() for v in vectors_of(model, "a") for p in v.parameters()])
        torch._dynamo.reset()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_basis_of_blocks_in_mixed_rows_and_files(tmp_path):
    model = fakes.llama()
    for i, basis in enumerate(["monarch", "random", "monarch"]):
        scramble(
            vt.attach(model, vt.VeraConfig(rank=8, basis=basis, seed=i // 2), f"a{i}"),
            f"a{i}",
            seed=i,
        )
    names = ["a2", None, "a0", "a1", "a0"]
    tokens = torch.randint(0, 300, (5, 6))
    with vt.rows(model, names):
        mixed = logits(model, tokens)
    for i, name in enumerate(names):
        vt.use(model, name)
        torch.testing.assert_close(
            mixed[i], logits(model, tokens[i : i + 1])[0], rtol=1e-4, atol=1e-5
        )
    vt.use(model, "a2")
    vt.save(model, tmp_path / "a.safetensors", name="a2")
    again = fakes.llama()
    vt.load(again, tmp_path / "a.safetensors", name="x")
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)
    assert vt.adapters(again)["x"].basis == "monarch"


def test_attaching_looks_through_the_model_once():
    """A Llama of a billion parameters, every linear layer at rank 1024: sites by the hundred, one copy of the basis."""
    config = hf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    vt.attach(model, vt.VeraConfig(rank=1024, targets=["all-linear"]))
    bases = {id(v.basis) for v in vectors_of(model, "default")}
    assert len(vectors_of(model, "default")) == 22 * 7
    assert len(bases) == 1


def test_compile_with_inductor():
    model = two_adapters()
    vt.use(model, "alice")
    torch.testing.assert_close(
        logits(torch.compile(model, fullgraph=True)), logits(model), rtol=1e-4, atol=1e-5
    )


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = two_adapters().train()
        vt.use(model, "alice")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        logits(model).square().sum().backward()
        grads.append([p.grad for v in vectors_of(model, "alice") for p in v.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_is_bitwise_repeatable_and_the_loss_falls():
    def run():
        model = vt.attach(fakes.llama(), vt.VeraConfig(rank=32), "a").train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
        losses = []
        for _ in range(15):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first = run()
    assert first == run()
    assert first[-1] < first[0] - 0.1


def test_an_adapter_of_a_model_in_evaluation_does_not_drop():
    model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=8, dropout=0.5), "a"), "a")
    assert torch.equal(logits(model), logits(model))


def test_threads_may_use_models_on_one_basis():
    results = {}

    bare = [fakes.llama() for _ in range(4)]

    def work(i):
        vt.attach(
            bare[i], vt.VeraConfig(rank=16 + 8 * i, seed=78), "x"
        )  # the shared matrices grow under the others
        results[i] = logits(scramble(bare[i], "x"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert torch.equal(results[i], logits(alone(vt.VeraConfig(rank=16 + 8 * i, seed=78), 0)))


def test_a_hundred_adapters_hold_one_basis():
    model = fakes.llama()
    for i in range(100):
        vt.attach(model, vt.VeraConfig(rank=16, seed=77), f"tenant{i}")
    bases = {id(v.basis): v.basis for i in range(100) for v in vectors_of(model, f"tenant{i}")}
    assert len(bases) == 1
    assert next(iter(bases.values())).allocated_bytes() == 4 * (16 * 32 + 32 * 16)


def test_a_model_without_adapters_says_so():
    for act in (
        lambda m: vt.use(m, "a"),
        vt.merge,
        vt.unmerge,
        vt.detach,
        lambda m: vt.save(m, "x.safetensors", "a"),
    ):
        with pytest.raises(AdapterError):
            act(fakes.llama())
